#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cpu/memory_arena.h"
#include "kernels/nested_linear.h"

namespace nestor {

// Components [begin, begin + size) of B, for 32 outputs after 32 outputs:
// [NumGroups(out)][size rounded up to pairs / 2][32][2], zeros behind an odd last one.
struct BSegment {
  int64_t begin = 0;
  int64_t size = 0;
  const int8_t* codes = nullptr;
  const uint16_t* scales = nullptr;  // bf16 [NumGroups(out)][size]

  int64_t PanelBytes() const { return (size + 1) / 2 * 2 * kGroupSize; }
  const int8_t* Panel(int64_t unit) const { return codes + unit * PanelBytes(); }
  const uint16_t* PanelScales(int64_t unit) const { return scales + unit * size; }
};

// Nested factors as the CPU reads them. B is cut where levels end, so that each of them reads a few
// contiguous streams. In one piece a level at half of the rank reads every other 8 KB of memory,
// and the hardware's prefetching fetches the rest as well: 10 GB/s of what is needed against 18-23
// (measured on Zen 4). Factors without levels are cut at 16, 32, 64, ...
struct PackedFactors {
  static constexpr int kMaxSegments = 12;

  int64_t max_rank = 0;
  const int8_t* a = nullptr;           // [max_rank][PaddedToGroup(in)]
  const uint16_t* a_scales = nullptr;  // bf16 [max_rank][NumGroups(in)]
  // bf16 [PaddedToGroup(max_rank)]: the largest scale of each component of B, then zeros.
  const uint16_t* largest_b_scales = nullptr;
  int num_segments = 0;
  BSegment segments[kMaxSegments] = {};

  // Those that a prefix of `rank` reads.
  std::span<const BSegment> SegmentsOf(int64_t rank) const;
};

// A frozen prefix: factors whose B makes the outputs behind the pivots.
struct PackedGar {
  PackedFactors factors;
  const int32_t* rows = nullptr;  // [out], the pivots first
};

// One linear layer in the CPU's own layout, one copy of every weight, but for what
// the middle plane repeats (kernels.h describes the
// panels). Plain pointers into the arena that it was packed into.
struct PackedLinear {
  int64_t out = 0;
  int64_t in = 0;
  const float* dense_f32 = nullptr;      // [out][in]
  const uint16_t* dense_bf16 = nullptr;  // bf16 panels
  const uint8_t* coarse = nullptr;       // coarse panels, scales among them
  const uint8_t* fine = nullptr;         // fine panels
  const uint8_t* middle = nullptr;       // middle panels (middle_plane.h)
  PackedFactors residual = {};
  PackedFactors prefix = {};
  std::vector<PackedGar> gar = {};
  const float* bias = nullptr;
  bool float_activations = false;  // multiplied in fp32 by any number of rows

  int64_t groups() const { return NumGroups(in); }
  // REQUIRES: there is one.
  const PackedGar& GarOfRank(int64_t rank) const;
  const uint8_t* CoarsePanel(int64_t panel) const;
  const uint8_t* FinePanel(int64_t panel) const;
  const uint8_t* MiddlePanel(int64_t panel) const;
  const uint16_t* Bf16Panel(int64_t panel) const;

  // What is counted when a part is read: for one output of a plane (scales count with the coarse
  // one) or of the bf16 or fp32 form, for one component of A, for one of B and 32 outputs.
  int64_t coarse_output_bytes() const { return PaddedToGroup(in) / 2 + 2 * groups(); }
  int64_t fine_output_bytes() const { return PaddedToGroup(in) / 2; }
  int64_t middle_output_bytes() const { return PaddedToGroup(in) / 4; }
  int64_t dense_output_bytes() const { return in * (dense_bf16 != nullptr ? 2 : 4); }
  int64_t a_component_bytes() const { return PaddedToGroup(in) + 2 * groups(); }
  static constexpr int64_t kBComponentBytes = kGroupSize + 2;
  // For one output of a gar pair: its place.
  static constexpr int64_t kRowOrderBytes = 4;
};

// RESOURCE_EXHAUSTED as the arena says. REQUIRES: `weights` are valid (call_checks.h).
absl::StatusOr<PackedLinear> PackLinear(const LinearWeights& weights, MemoryArena* arena);

// out[0..in) = row `row` of the dense form.
void UnpackDenseRow(const PackedLinear& layer, int64_t row, float* out);

}  // namespace nestor
