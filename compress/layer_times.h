#pragma once

#include <cstdint>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "compress/forward.h"
#include "engine/nested_model.h"

namespace nestor {

// What layers take on this device, measured, for steps of a fixed number of rows: the cost that a
// ladder for this device is searched by (Once-for-All: latency, not FLOPs). Immutable.
class LayerTimes {
 public:
  // Runs the layers of each shape one after the other, as a step does, so that weights come from
  // where they lie in a model of that size; forms and ranks are those that `model` stores, at a few
  // ranks each. The fastest of several rounds counts. Attention and norms, which no level changes,
  // are not in it. REQUIRES: rows > 0.
  static absl::StatusOr<LayerTimes> Measure(const NestedModel& model,
                                            const BackendFactory& make_backend, int64_t rows);

  // Nanoseconds, linear in the rank between those measured. REQUIRES: the model's parts have that
  // form.
  int64_t Of(const LinearSpec& layer, FormAndRank choice) const;
  int64_t OfProfile(const std::vector<LinearSpec>& layers, const Profile& profile) const;

 private:
  using Kind = std::tuple<int64_t, int64_t, Form>;  // out, in, form
  LayerTimes() = default;
  std::map<Kind, std::vector<std::pair<int64_t, double>>> times_;  // {rank, ns}, ascending
};

}  // namespace nestor
