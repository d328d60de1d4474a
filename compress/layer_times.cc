#include "compress/layer_times.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <random>
#include <span>

#include "base/check.h"
#include "base/progress.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

constexpr int kRounds = 7;
// Ranks that each form is timed at, in equal steps to the largest.
constexpr int64_t kRanks = 4;

// Layers of one shape on a backend.
struct Shape {
  int64_t out = 0;
  int64_t in = 0;
  int64_t residual_rank = std::numeric_limits<int64_t>::max();  // the least that is stored
  int64_t prefix_rank = std::numeric_limits<int64_t>::max();
  bool has_coarse_plane = true;
  bool has_middle_plane = true;  // all of them
  std::vector<LinearId> layers;
};

using Shapes = std::map<std::pair<int64_t, int64_t>, Shape>;

absl::StatusOr<Shapes> LoadShapes(const NestedModel& model, Backend* backend) {
  Shapes shapes;
  for (size_t i = 0; i < model.layers().size(); ++i) {
    const LinearSpec& layer = model.layers()[i];
    std::vector<float> scratch;
    NESTOR_ASSIGN_OR_RETURN(const LinearWeights weights, model.Weights(i, &scratch));
    Shape& shape = shapes[{layer.out, layer.in}];
    shape.out = layer.out;
    shape.in = layer.in;
    shape.residual_rank = std::min(shape.residual_rank, weights.residual.max_rank);
    shape.prefix_rank = std::min(shape.prefix_rank, weights.prefix.max_rank);
    shape.has_coarse_plane = weights.coarse != nullptr;
    shape.has_middle_plane = shape.has_middle_plane && weights.middle != nullptr;
    NESTOR_ASSIGN_OR_RETURN(shape.layers.emplace_back(), backend->LoadLinear(weights));
  }
  return shapes;
}

// A tensor [rows, cols] of normal values.
absl::StatusOr<Tensor> RandomTensor(int64_t rows, int64_t cols, Backend* backend) {
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(rows * cols));
  for (float& value : values) value = normal(random);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < rows; ++i) ids.push_back(static_cast<int32_t>(i));
  NESTOR_ASSIGN_OR_RETURN(const TableId table, backend->LoadTable(values, rows, cols));
  NESTOR_ASSIGN_OR_RETURN(const Tensor tensor, backend->Allocate(rows, cols));
  backend->Embed({.table = table, .ids = ids, .out = tensor});
  return tensor;
}

std::vector<FormAndRank> TimedChoices(const Shape& shape) {
  std::vector<FormAndRank> choices = {{Form::kDense, 0}};
  const auto add = [&](Form form, int64_t first, int64_t largest) {
    int64_t last = -1;
    for (int64_t i = 0; i < kRanks; ++i) {
      const int64_t rank = first + (largest - first) * i / (kRanks - 1);
      if (rank != last) choices.push_back({form, rank});
      last = rank;
    }
  };
  if (shape.has_coarse_plane) add(Form::kResidual, 0, shape.residual_rank);
  if (shape.has_middle_plane) choices.push_back({Form::kMiddle, 0});
  if (shape.prefix_rank > 0) {
    add(Form::kPrefix, std::max<int64_t>(1, shape.prefix_rank / kRanks), shape.prefix_rank);
  }
  return choices;
}

// Nanoseconds for one layer.
double TimeOnce(const Shape& shape, FormAndRank choice, const Tensor& in, const Tensor& out,
                int64_t rows, Backend* backend) {
  const RowGroup group = {.begin = 0, .end = rows, .form = choice.form, .rank = choice.rank};
  const auto start = std::chrono::steady_clock::now();
  for (const LinearId layer : shape.layers) {
    const LinearPart part = {.layer = layer, .groups = std::span(&group, 1), .out = out};
    backend->Linear({.in = in, .rows = rows, .parts = std::span(&part, 1)});
  }
  // Waits for what was submitted. A row of a head is long, but not beside its product.
  std::vector<float> row(static_cast<size_t>(shape.out));
  backend->Read(out, rows - 1, 1, row.data());
  const std::chrono::duration<double, std::nano> elapsed = std::chrono::steady_clock::now() - start;
  return elapsed.count() / static_cast<double>(shape.layers.size());
}

}  // namespace

absl::StatusOr<LayerTimes> LayerTimes::Measure(const NestedModel& model,
                                               const BackendFactory& make_backend, int64_t rows) {
  NESTOR_CHECK(rows > 0);
  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend, make_backend());
  NESTOR_ASSIGN_OR_RETURN(const Shapes shapes, LoadShapes(model, backend.get()));
  Progress progress("Timing layers", static_cast<int64_t>(shapes.size()));
  LayerTimes times;
  std::map<int64_t, Tensor> inputs;  // by size
  for (const auto& [size, shape] : shapes) {
    if (!inputs.contains(shape.in)) {
      NESTOR_ASSIGN_OR_RETURN(inputs[shape.in], RandomTensor(rows, shape.in, backend.get()));
    }
    NESTOR_ASSIGN_OR_RETURN(const Tensor out, backend->Allocate(rows, shape.out));
    const std::vector<FormAndRank> choices = TimedChoices(shape);
    std::vector<double> least(choices.size(), std::numeric_limits<double>::infinity());
    for (int round = 0; round < kRounds; ++round) {
      for (size_t i = 0; i < choices.size(); ++i) {
        least[i] = std::min(
            least[i], TimeOnce(shape, choices[i], inputs[shape.in], out, rows, backend.get()));
      }
    }
    for (size_t i = 0; i < choices.size(); ++i) {
      times.times_[{shape.out, shape.in, choices[i].form}].emplace_back(choices[i].rank, least[i]);
    }
    progress.Advance();
  }
  return times;
}

int64_t LayerTimes::Of(const LinearSpec& layer, FormAndRank choice) const {
  if (choice.form == Form::kGar) {
    const int64_t sizes = layer.out + layer.in;
    choice = {Form::kPrefix, choice.rank * (sizes - choice.rank) / sizes};
  }
  const auto found = times_.find({layer.out, layer.in, choice.form});
  NESTOR_CHECK(found != times_.end());
  const auto& points = found->second;
  if (points.size() == 1) return std::llround(points[0].second);
  size_t above = 1;
  while (above + 1 < points.size() && points[above].first < choice.rank) ++above;
  const auto& [low_rank, low] = points[above - 1];
  const auto& [high_rank, high] = points[above];
  const double share =
      static_cast<double>(choice.rank - low_rank) / static_cast<double>(high_rank - low_rank);
  // Beyond the smallest rank noise must not turn a time negative.
  return std::max<int64_t>(1, std::llround(low + share * (high - low)));
}

int64_t LayerTimes::OfProfile(const std::vector<LinearSpec>& layers, const Profile& profile) const {
  int64_t total = 0;
  for (size_t i = 0; i < layers.size(); ++i) total += Of(layers[i], profile[i]);
  return total;
}

}  // namespace nestor
