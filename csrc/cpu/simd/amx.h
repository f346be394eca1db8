// AMX: eight tile registers of 16 rows of 64 bytes, and products of them that are added to a third.
// A thread has tiles while an Amx lives. ELMKERNELS_EMULATED_AMX, which tests alone define, puts
// plain C++ in the place of the intrinsics.
#pragma once

#include <cstdint>

#if defined(ELMKERNELS_EMULATED_AMX)
#include "cpu/simd/amx_emulated.h"
#else
#include <immintrin.h>
#endif

#if defined(__AMX_BF16__) || defined(ELMKERNELS_EMULATED_AMX)
#define ELMKERNELS_AMX 1
#endif

constexpr int64_t kAmxRows = 16;   // of a tile
constexpr int64_t kAmxLanes = 16;  // of 32 bits, of a row

#if defined(ELMKERNELS_AMX)

class Amx {
 public:
  Amx() { _tile_loadconfig(kWhole); }
  ~Amx() { _tile_release(); }
  Amx(const Amx&) = delete;
  Amx& operator=(const Amx&) = delete;

  // Between stores to memory and the first load of a tile from there: g++'s intrinsics don't tell
  // the compiler that they read memory.
  static void see_memory() { asm volatile("" ::: "memory"); }

 private:
  // The first palette; eight times 64 bytes a row, from byte 16 on, and 16 rows, from byte 48 on.
  alignas(64) static constexpr uint8_t kWhole[64] = {
      1, 0,                                                                       //
      0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,                                   //
      64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,                     //
      0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,                             //
      16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0};
};

#else

// Without tiles: nothing to be had, nothing to be given back.
struct Amx {
  Amx() {}
};

#endif
