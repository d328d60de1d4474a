#include <algorithm>
#include <cmath>
#include <limits>

#include "base/bfloat16.h"
#include "kernels/cpu/attention_kernels.h"

namespace nestor {
namespace {

struct Float32 {
  using Scalar = float;
  static float Key(const float* keys, int64_t d, int64_t lane) {
    return keys[d * kKeyBlock + lane];
  }
  static float Value(const float* values, int64_t dim, int64_t d, int64_t lane) {
    return values[lane * dim + d];
  }
};

struct Bfloat16 {
  using Scalar = uint16_t;
  static float Key(const uint16_t* keys, int64_t d, int64_t lane) {
    return FloatFromBfloat16(keys[(d / 2 * kKeyBlock + lane) * 2 + d % 2]);
  }
  static float Value(const uint16_t* values, int64_t dim, int64_t d, int64_t lane) {
    return FloatFromBfloat16(values[(lane / 2 * dim + d) * 2 + lane % 2]);
  }
};

template <typename Type>
void Attend(const AttentionTile& tile) {
  for (int64_t i = 0; i < tile.num_queries; ++i) {
    const float* query = static_cast<const float*>(tile.queries) + i * tile.dim;
    float* sums = tile.sums + i * tile.sum_stride;
    float* scores = tile.scores + i * kTileKeys;
    const auto visible = [&](const KeyBlock& block) {
      return std::clamp<int64_t>(tile.limits[i] - block.begin, 0, block.positions);
    };
    float maximum = tile.maxima[i];
    for (int64_t b = 0; b < tile.num_blocks; ++b) {
      const auto* keys = static_cast<const typename Type::Scalar*>(tile.blocks[b].keys);
      for (int64_t lane = 0; lane < visible(tile.blocks[b]); ++lane) {
        float score = 0;
        for (int64_t d = 0; d < tile.dim; ++d) score += query[d] * Type::Key(keys, d, lane);
        scores[b * kKeyBlock + lane] = score;
        maximum = std::max(maximum, score);
      }
    }
    if (visible(tile.blocks[0]) == 0) continue;
    const float correction = std::exp2(tile.maxima[i] - maximum);
    tile.maxima[i] = maximum;
    float total = 0;
    for (int64_t d = 0; d < tile.dim; ++d) sums[d] *= correction;
    for (int64_t b = 0; b < tile.num_blocks; ++b) {
      const auto* values = static_cast<const typename Type::Scalar*>(tile.blocks[b].values);
      for (int64_t lane = 0; lane < visible(tile.blocks[b]); ++lane) {
        const float weight = std::exp2(scores[b * kKeyBlock + lane] - maximum);
        total += weight;
        for (int64_t d = 0; d < tile.dim; ++d)
          sums[d] += weight * Type::Value(values, tile.dim, d, lane);
      }
    }
    tile.totals[i] = tile.totals[i] * correction + total;
  }
}

}  // namespace

const AttentionKernels& PortableAttention(KvCacheType type) {
  static constexpr AttentionKernels kFloat32 = {.attend = Attend<Float32>};
  static constexpr AttentionKernels kBfloat16 = {.attend = Attend<Bfloat16>};
  return type == KvCacheType::kFloat32 ? kFloat32 : kBfloat16;
}

}  // namespace nestor
