#pragma once

#include <cstdint>

#include "kernels/cpu/kernels.h"

// For files that are compiled for one instruction set each: in an unnamed namespace, so that every
// one of them keeps a copy of its own.
namespace nestor {
namespace {

// The rows of factor_b, up to four at a time. `round(scales, z, rank, scratch, rounded)` turns a
// row's z into 16-bit integers times the scale that it returns, in place: what is written lies
// before what is read. `multiply(count, pairs, z, scales, out)` adds the products of `count` rows,
// z being pairs of those integers.
template <typename Round, typename Multiply>
inline void ForFourRows(const uint16_t* scales, int64_t rank, const FloatRow* rows, int num_rows,
                        float* scratch, float* out, Round round, Multiply multiply) {
  const int64_t padded_rank = (rank + 15) / 16 * 16;
  const int64_t pairs = (rank + 1) / 2;
  for (int begin = 0; begin < num_rows; begin += 4) {
    const int count = num_rows - begin < 4 ? num_rows - begin : 4;
    const int32_t* z[4];
    float row_scales[4];
    float* at[4];
    for (int t = 0; t < count; ++t) {
      const FloatRow& row = rows[begin + t];
      float* own = scratch + t * padded_rank;
      row_scales[t] = round(scales, row.values, rank, own, reinterpret_cast<int16_t*>(own));
      z[t] = reinterpret_cast<const int32_t*>(own);
      at[t] = out + row.index * kUnitOutputs;
    }
    multiply(count, pairs, z, row_scales, at);
  }
}

}  // namespace
}  // namespace nestor
