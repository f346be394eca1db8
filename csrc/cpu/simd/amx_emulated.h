// The intrinsics of AMX in plain C++, for tests on processors without it: same names, same rules.
// Tiles have the shapes of the configuration; without one every use ends the process, as it does on
// a processor. Products flush denormals to zero and sum a tile's even and odd elements apart.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace amx_emulated {

struct Tile {
  int rows = 0, bytes = 0;
  alignas(64) uint8_t data[16][64] = {};
};

struct Registers {
  bool configured = false;
  Tile tiles[8];
};

inline thread_local Registers registers;

inline Tile& tile(int index) {
  if (!registers.configured) std::abort();
  return registers.tiles[index];
}

inline void loadconfig(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  registers = Registers{};
  if (bytes[0] != 1) std::abort();  // the only palette there is
  registers.configured = true;
  for (int i = 0; i < 8; ++i) {
    Tile& t = registers.tiles[i];
    t.rows = bytes[48 + i];
    t.bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
    if (t.rows > 16 || t.bytes > 64 || (t.rows == 0) != (t.bytes == 0)) std::abort();
  }
}

inline void release() { registers = Registers{}; }

inline void zero(int index) { std::memset(tile(index).data, 0, sizeof(Tile::data)); }

inline void loadd(int index, const void* base, int64_t stride) {
  Tile& t = tile(index);
  zero(index);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(t.data[r], static_cast<const uint8_t*>(base) + r * stride, t.bytes);
}

inline void stored(int index, void* base, int64_t stride) {
  const Tile& t = tile(index);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, t.data[r], t.bytes);
}

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// The bfloat16 in the low or the high half of a lane.
inline float low_of(uint32_t lane) {
  const uint32_t bits = lane << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}
inline float high_of(uint32_t lane) { return low_of(lane >> 16); }

// to += a b: rows of a hold pairs along the sum, and so do the columns of b.
inline void dpbf16ps(int to, int a, int b) {
  Tile &c = tile(to), &x = tile(a), &y = tile(b);
  if (c.rows != x.rows || c.bytes != y.bytes || x.bytes != 4 * y.rows) std::abort();
  if (to == a || to == b || a == b) std::abort();
  uint32_t columns[16][16], row[16];
  std::memcpy(columns, y.data, sizeof columns);
  for (int m = 0; m < c.rows; ++m) {
    float even[16] = {}, odd[16] = {}, sums[16];
    std::memcpy(row, x.data[m], sizeof row);
    std::memcpy(sums, c.data[m], sizeof sums);
    for (int k = 0; k < y.rows; ++k) {
      const float low = low_of(row[k]), high = high_of(row[k]);
      // A product of two bfloat16 is exact, so that this is one fused operation each.
      for (int n = 0; n < 16; ++n) even[n] = flushed(even[n] + low * low_of(columns[k][n]));
      for (int n = 0; n < 16; ++n) odd[n] = flushed(odd[n] + high * high_of(columns[k][n]));
    }
    for (int n = 0; n < 16; ++n)
      sums[n] = flushed(flushed(sums[n]) + flushed(even[n] + odd[n]));
    std::memcpy(c.data[m], sums, c.bytes);
  }
}

}  // namespace amx_emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) amx_emulated::loadconfig(config)
#define _tile_release() amx_emulated::release()
#define _tile_loadd(to, base, stride) amx_emulated::loadd(to, base, stride)
#define _tile_stored(from, base, stride) amx_emulated::stored(from, base, stride)
#define _tile_zero(to) amx_emulated::zero(to)
#define _tile_dpbf16ps(to, a, b) amx_emulated::dpbf16ps(to, a, b)
