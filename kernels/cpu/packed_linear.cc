#include "kernels/cpu/packed_linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/bfloat16.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/middle_plane.h"

namespace nestor {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kCodeBytes = 4 * kLineBytes;  // of a group of a panel
constexpr int64_t kBytesOfRow = kGroupSize / 2;
constexpr int64_t kFirstSegment = 16;

int64_t RoundUpToPair(int64_t rank) { return (rank + 1) / 2 * 2; }

int64_t NumPanels(int64_t out) { return (out + kPanelOutputs - 1) / kPanelOutputs; }

// 16 bytes as stored (input 2 j in the low nibble of byte j) to 4 bytes in each of 4 lines.
void PackGroupOfRow(const uint8_t* stored, uint8_t* group, int64_t output) {
  const auto code = [stored](int64_t j) {
    return static_cast<uint8_t>(j % 2 == 0 ? stored[j / 2] & 0x0f : stored[j / 2] >> 4);
  };
  for (int64_t line = 0; line < 4; ++line) {
    for (int64_t i = 0; i < 4; ++i) {
      group[line * kLineBytes + output * 4 + i] =
          static_cast<uint8_t>(code(4 * line + i) | (code(kGroupSize / 2 + 4 * line + i) << 4));
    }
  }
}

// The 32 codes of one output in a group of a panel.
void UnpackGroupOfRow(const uint8_t* group, int64_t output, uint8_t* codes) {
  for (int64_t line = 0; line < 4; ++line) {
    for (int64_t i = 0; i < 4; ++i) {
      const uint8_t byte = group[line * kLineBytes + output * 4 + i];
      codes[4 * line + i] = byte & 0x0f;
      codes[kGroupSize / 2 + 4 * line + i] = byte >> 4;
    }
  }
}

template <typename T>
absl::StatusOr<const T*> Copied(const T* values, int64_t count, MemoryArena* arena) {
  NESTOR_ASSIGN_OR_RETURN(T * result, arena->Allocate<T>(count));
  std::memcpy(result, values, count * sizeof(T));
  return result;
}

// `scales` may be null: then the groups of the panel are codes alone.
absl::StatusOr<const uint8_t*> PackPlane(const LinearWeights& weights, const uint8_t* plane,
                                         const uint16_t* scales, MemoryArena* arena) {
  const int64_t groups = NumGroups(weights.in);
  const int64_t group_bytes = scales != nullptr ? kCoarseGroupBytes : kFineGroupBytes;
  NESTOR_ASSIGN_OR_RETURN(uint8_t * result,
                          arena->Allocate<uint8_t>(NumPanels(weights.out) * groups * group_bytes));
  for (int64_t row = 0; row < weights.out; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t* group = result + ((row / kPanelOutputs) * groups + g) * group_bytes;
      const int64_t output = row % kPanelOutputs;
      PackGroupOfRow(plane + (row * groups + g) * kBytesOfRow, group, output);
      if (scales != nullptr)
        std::memcpy(group + kCodeBytes + output * 2, scales + row * groups + g, 2);
    }
  }
  return result;
}

absl::StatusOr<const uint8_t*> PackMiddlePlane(const LinearWeights& weights, MemoryArena* arena) {
  const int64_t groups = NumGroups(weights.in);
  const int64_t bytes = NumPanels(weights.out) * groups * kMiddleGroupBytes;
  NESTOR_ASSIGN_OR_RETURN(uint8_t * result, arena->Allocate<uint8_t>(bytes));
  std::fill_n(result, bytes, 0);
  for (int64_t row = 0; row < weights.out; ++row) {
    const int64_t output = row % kPanelOutputs;
    for (int64_t j = 0; j < weights.in; ++j) {
      const int64_t place = row * (PaddedToGroup(weights.in) / 4) + j / 4;
      const unsigned code = weights.middle[place] >> (2 * (j % 4)) & 3u;
      // Where a fine panel has it: a line, a nibble, a byte.
      const int64_t line = j % kGroupSize / 4 % 4;
      const int64_t nibble = j % kGroupSize / (kGroupSize / 2);
      uint8_t* group = result + (row / kPanelOutputs * groups + j / kGroupSize) * kMiddleGroupBytes;
      group[line / 2 * kLineBytes + 4 * output + j % 4] |=
          static_cast<uint8_t>(code << (4 * (line % 2) + 2 * nibble));
    }
  }
  return result;
}

absl::StatusOr<const uint16_t*> PackBf16(const LinearWeights& weights, MemoryArena* arena) {
  const int64_t panel_size = weights.in * kPanelOutputs;
  NESTOR_ASSIGN_OR_RETURN(uint16_t * result,
                          arena->Allocate<uint16_t>(NumPanels(weights.out) * panel_size));
  for (int64_t row = 0; row < weights.out; ++row) {
    const int64_t output = row % kPanelOutputs;
    const int64_t slot = 2 * (output % 8) + output / 8;
    uint16_t* panel = result + row / kPanelOutputs * panel_size;
    for (int64_t j = 0; j < weights.in; ++j)
      panel[j * kPanelOutputs + slot] = weights.dense_bf16[row * weights.in + j];
  }
  return result;
}

absl::StatusOr<BSegment> PackSegment(const FactorView& view, int64_t out, int64_t begin,
                                     int64_t size, MemoryArena* arena) {
  const int64_t panels = NumGroups(out);
  BSegment segment = {.begin = begin, .size = size};
  NESTOR_ASSIGN_OR_RETURN(int8_t * codes, arena->Allocate<int8_t>(panels * segment.PanelBytes()));
  NESTOR_ASSIGN_OR_RETURN(uint16_t * scales, arena->Allocate<uint16_t>(panels * size));
  for (int64_t k = 0; k < size; ++k) {
    for (int64_t p = 0; p < panels; ++p) {
      const int8_t* stored = view.bt + ((begin + k) * panels + p) * kGroupSize;
      int8_t* pair = codes + p * segment.PanelBytes() + k / 2 * 2 * kGroupSize;
      for (int64_t o = 0; o < kGroupSize; ++o) pair[2 * o + k % 2] = stored[o];
      scales[p * size + k] = view.bt_scales[(begin + k) * panels + p];
    }
  }
  segment.codes = codes;
  segment.scales = scales;
  return segment;
}

absl::StatusOr<const uint16_t*> LargestBScales(const FactorView& view, int64_t out,
                                               MemoryArena* arena) {
  NESTOR_ASSIGN_OR_RETURN(uint16_t * result,
                          arena->Allocate<uint16_t>(PaddedToGroup(view.max_rank)));
  std::fill_n(result, PaddedToGroup(view.max_rank), uint16_t{0});
  for (int64_t k = 0; k < view.max_rank; ++k) {
    // Positive floats compare as their bits do.
    const uint16_t* scales = view.bt_scales + k * NumGroups(out);
    result[k] = *std::max_element(scales, scales + NumGroups(out));
  }
  return result;
}

// Where B is cut: ascending, the last one being the stored rank. All others are even, since pairs
// of components lie together.
std::vector<int64_t> SegmentEnds(const FactorView& view) {
  std::vector<int64_t> ends;
  for (const int64_t rank : view.level_ranks) {
    if (rank > 0 && rank + 1 < view.max_rank) ends.push_back(RoundUpToPair(rank));
  }
  if (view.level_ranks.empty()) {
    for (int64_t end = kFirstSegment; end < view.max_rank; end *= 2) ends.push_back(end);
  }
  std::sort(ends.begin(), ends.end());
  ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
  if (ends.size() >= PackedFactors::kMaxSegments) ends.resize(PackedFactors::kMaxSegments - 1);
  ends.push_back(view.max_rank);
  return ends;
}

absl::StatusOr<PackedFactors> PackFactors(const FactorView& view, int64_t out, int64_t in,
                                          MemoryArena* arena) {
  const int64_t rank = view.max_rank;
  PackedFactors result = {.max_rank = rank};
  if (rank == 0) return result;
  NESTOR_ASSIGN_OR_RETURN(result.a, Copied(view.a, rank * PaddedToGroup(in), arena));
  NESTOR_ASSIGN_OR_RETURN(result.a_scales, Copied(view.a_scales, rank * NumGroups(in), arena));
  NESTOR_ASSIGN_OR_RETURN(result.largest_b_scales, LargestBScales(view, out, arena));
  int64_t begin = 0;
  for (const int64_t end : SegmentEnds(view)) {
    NESTOR_ASSIGN_OR_RETURN(result.segments[result.num_segments],
                            PackSegment(view, out, begin, end - begin, arena));
    ++result.num_segments;
    begin = end;
  }
  return result;
}

}  // namespace

std::span<const BSegment> PackedFactors::SegmentsOf(int64_t rank) const {
  int count = 0;
  while (count < num_segments && segments[count].begin < rank) ++count;
  return {segments, static_cast<size_t>(count)};
}

const PackedGar& PackedLinear::GarOfRank(int64_t rank) const {
  const auto found = std::find_if(
      gar.begin(), gar.end(), [&](const PackedGar& pair) { return pair.factors.max_rank == rank; });
  NESTOR_CHECK(found != gar.end());
  return *found;
}

const uint8_t* PackedLinear::CoarsePanel(int64_t panel) const {
  return coarse + panel * groups() * kCoarseGroupBytes;
}

const uint8_t* PackedLinear::FinePanel(int64_t panel) const {
  return fine + panel * groups() * kFineGroupBytes;
}

const uint8_t* PackedLinear::MiddlePanel(int64_t panel) const {
  return middle + panel * groups() * kMiddleGroupBytes;
}

const uint16_t* PackedLinear::Bf16Panel(int64_t panel) const {
  return dense_bf16 + panel * in * kPanelOutputs;
}

absl::StatusOr<PackedLinear> PackLinear(const LinearWeights& weights, MemoryArena* arena) {
  PackedLinear layer = {
      .out = weights.out, .in = weights.in, .float_activations = weights.float_activations};
  if (weights.dense_f32 != nullptr) {
    NESTOR_ASSIGN_OR_RETURN(layer.dense_f32,
                            Copied(weights.dense_f32, weights.out * weights.in, arena));
  }
  if (weights.dense_bf16 != nullptr) {
    NESTOR_ASSIGN_OR_RETURN(layer.dense_bf16, PackBf16(weights, arena));
  }
  if (weights.coarse != nullptr) {
    NESTOR_ASSIGN_OR_RETURN(layer.coarse,
                            PackPlane(weights, weights.coarse, weights.scales, arena));
  }
  if (weights.fine != nullptr) {
    NESTOR_ASSIGN_OR_RETURN(layer.fine, PackPlane(weights, weights.fine, nullptr, arena));
  }
  if (weights.middle != nullptr) {
    NESTOR_ASSIGN_OR_RETURN(layer.middle, PackMiddlePlane(weights, arena));
  }
  NESTOR_ASSIGN_OR_RETURN(layer.residual,
                          PackFactors(weights.residual, weights.out, weights.in, arena));
  NESTOR_ASSIGN_OR_RETURN(layer.prefix,
                          PackFactors(weights.prefix, weights.out, weights.in, arena));
  for (const GarView& view : weights.gar) {
    PackedGar& pair = layer.gar.emplace_back();
    FactorView factors = view.factors;
    factors.level_ranks = {factors.max_rank};  // in one piece
    NESTOR_ASSIGN_OR_RETURN(
        pair.factors, PackFactors(factors, weights.out - factors.max_rank, weights.in, arena));
    NESTOR_ASSIGN_OR_RETURN(pair.rows, Copied(view.rows, weights.out, arena));
  }
  if (weights.bias != nullptr) {
    NESTOR_ASSIGN_OR_RETURN(layer.bias, Copied(weights.bias, weights.out, arena));
  }
  return layer;
}

void UnpackDenseRow(const PackedLinear& layer, int64_t row, float* out) {
  const int64_t panel = row / kPanelOutputs;
  const int64_t output = row % kPanelOutputs;
  if (layer.dense_f32 != nullptr) {
    std::memcpy(out, layer.dense_f32 + row * layer.in, layer.in * sizeof(float));
    return;
  }
  if (layer.dense_bf16 != nullptr) {
    const uint16_t* values = layer.Bf16Panel(panel) + 2 * (output % 8) + output / 8;
    for (int64_t j = 0; j < layer.in; ++j) out[j] = FloatFromBfloat16(values[j * kPanelOutputs]);
    return;
  }
  for (int64_t g = 0; g < layer.groups(); ++g) {
    const uint8_t* coarse = layer.CoarsePanel(panel) + g * kCoarseGroupBytes;
    uint8_t hi[kGroupSize];
    uint8_t lo[kGroupSize];
    UnpackGroupOfRow(coarse, output, hi);
    UnpackGroupOfRow(layer.FinePanel(panel) + g * kFineGroupBytes, output, lo);
    uint16_t scale_bits;
    std::memcpy(&scale_bits, coarse + kCodeBytes + output * 2, 2);
    const float scale = FloatFromBfloat16(scale_bits);
    const int64_t count = std::min(kGroupSize, layer.in - g * kGroupSize);
    for (int64_t i = 0; i < count; ++i)
      out[g * kGroupSize + i] = scale * static_cast<float>(16 * hi[i] + lo[i] - 136);
  }
}

}  // namespace nestor
