#pragma once

#include <immintrin.h>

#include <cstdint>

// For files that are compiled for one instruction set each, as factor_b_rows.h.
namespace nestor {
namespace {

// The rows of a tile: as many sums as fit into registers beside a line of weights.
constexpr int64_t kTileRows = 12;

template <int T>
struct TileSize {
  static constexpr int kRows = T;
};

// Calls tile(TileSize<T>(), t) for rows t to t + T, twelve and twelve and what is left.
template <typename Tile>
inline void ForEachTile(int64_t rows, Tile tile) {
  int64_t t = 0;
  for (; t + kTileRows <= rows; t += kTileRows) tile(TileSize<12>(), t);
  switch (rows - t) {
    case 11:
      return tile(TileSize<11>(), t);
    case 10:
      return tile(TileSize<10>(), t);
    case 9:
      return tile(TileSize<9>(), t);
    case 8:
      return tile(TileSize<8>(), t);
    case 7:
      return tile(TileSize<7>(), t);
    case 6:
      return tile(TileSize<6>(), t);
    case 5:
      return tile(TileSize<5>(), t);
    case 4:
      return tile(TileSize<4>(), t);
    case 3:
      return tile(TileSize<3>(), t);
    case 2:
      return tile(TileSize<2>(), t);
    case 1:
      return tile(TileSize<1>(), t);
    default:
      return;
  }
}

// The first `outputs` <= 16 lanes.
inline __mmask16 LanesOf(int64_t outputs) {
  return static_cast<__mmask16>((1u << static_cast<unsigned>(outputs)) - 1u);
}

// out (+)= sums + bias in the lanes of `mask`.
inline void Finish(__m512 sums, const float* bias, __mmask16 mask, bool adds, float* out) {
  if (bias != nullptr) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(mask, bias));
  if (adds) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(mask, out));
  _mm512_mask_storeu_ps(out, mask, sums);
}

}  // namespace
}  // namespace nestor
