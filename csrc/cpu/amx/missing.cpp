// Why this process can't use the library, asked once when it is loaded.
#include "cpu/amx/trial.h"
#include "cpu/simd/amx_product.h"

namespace {

// Twos by threes, and some of one: 16 x 16 sums of 32 products.
bool right() {
  alignas(64) Bf16Pair twos[kAmxRows * kAmxLanes], threes[kAmxRows * kAmxLanes];
  alignas(64) float sums[kAmxRows * kAmxLanes];
  for (int i = 0; i < kAmxRows * kAmxLanes; ++i) {
    twos[i].bits = 0x40004000;
    threes[i].bits = 0x40404040;
    sums[i] = 1.0f;
  }
  {
    const Amx amx;
    product({twos, kAmxLanes}, {threes, kAmxLanes}, {sums, kAmxLanes}, kAmxRows, kAmxLanes,
            kAmxLanes, true);
  }
  for (float sum : sums)
    if (sum != 1.0f + 32 * 6) return false;
  return true;
}

Reason missing() {
#if !defined(ELMKERNELS_EMULATED_AMX)
  if (const Reason refused = ask_for_tiles()) return refused;
#endif
  return try_in_child(right);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* elmkernels_missing() {
  static const Reason found = missing();
  return found;
}
