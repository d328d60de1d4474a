#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "compress/allocate.h"
#include "compress/decompose.h"
#include "compress/quantise.h"
#include "engine/model_spec.h"
#include "kernels/nested_linear.h"

namespace nestor {

// What a layer's parts are made for.
struct LayerSettings {
  DenseStorage dense = DenseStorage::kPlanes;  // kPlanes or kBf16
  bool has_residual_ladder = true;
  bool has_prefix_ladder = false;
  int64_t max_residual_rank = 64;
  bool may_be_gar = false;  // on some level of the prefix ladder
};

struct FactorPair {
  FactorCodes a;   // [rank, in]
  FactorCodes bt;  // [rank, out]
};

FactorPair QuantisePair(const Decomposition& decomposition, int64_t out, int64_t in);

// One layer in all its forms, and what each choice costs and loses.
struct LayerParts {
  std::optional<Planes> planes;      // not in a bf16 artifact without residual ladder
  std::vector<uint16_t> dense_bf16;  // [out, in]; bf16 artifacts
  std::optional<FactorPair> residual;
  std::optional<FactorPair> prefix;
  std::vector<LayerOption> residual_options;  // cost in weight bytes
  std::vector<LayerOption> prefix_options;    // cost in FLOPs
};

// Ranks that a prefix ladder may use, ascending: those whose plain factors cost fewer FLOPs than
// the dense layer, and where they may be gar pairs, those up to nine tenths of the full rank.
std::vector<int64_t> PrefixRanks(int64_t out, int64_t in, bool may_be_gar);

// Quantises and decomposes `weights` [out, in] for inputs with second moment `moment` [in, in]. An
// option's error is the energy it loses of the layer's output, as share of tr(W S W^T). A pure
// function, so layers may run side by side.
absl::StatusOr<LayerParts> CompressLayer(const LinearSpec& spec, std::span<const float> weights,
                                         std::span<const double> moment,
                                         const LayerSettings& settings);

}  // namespace nestor
