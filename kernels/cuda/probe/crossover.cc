// T*: where raising all rows to the step's largest rank stops being free.
//
// Half of the rows asks for half of the rank, half for an eighth. Three ways to run a layer:
//   raised    every row at the large rank: one pair over all rows
//   segments  two pairs, each over its own rows
//   large     the large rank's rows alone: what the step costs without the others
// Raising is free while `raised` costs what `large` costs.
#include "kernels/cuda/probe/prefix_pair.h"
#include "kernels/cuda/probe/probe.h"
#include "kernels/cuda/probe/timing.h"

namespace nestor::probe {
namespace {

constexpr const char* kQuestion = "crossover";
constexpr int64_t kTotalRows[] = {2, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048};
constexpr int kLargeEighths = 4;
constexpr int kSmallEighths = 1;

struct Segment {
  const PrefixPair* pair;
  int64_t first_row;
  int64_t rows;
};

struct Step {
  NumberType type;
  LayerShape layer;
  int64_t rows;  // of the mixed step
};

void MeasureSegments(const Probe& probe, const Step& step, const std::string& form,
                     const std::vector<Segment>& segments, int64_t min_invocations) {
  const char* x = static_cast<const char*>(probe.x(step.type));
  char* y = static_cast<char*>(probe.y);
  const auto x_of = [&](const Segment& segment) {
    return x + segment.first_row * step.layer.n * BytesOf(step.type);
  };
  const auto y_of = [&](const Segment& segment) {
    return y + segment.first_row * step.layer.m * BytesOf(NumberType::kBf16);
  };
  double error = 0;
  for (const Segment& segment : segments) {
    error = WorseError(error, CheckedError(probe, *segment.pair, step.layer, segment.rows,
                                           x_of(segment), y_of(segment)));
  }
  const Timing timing =
      TimeInGraph(probe.stream, min_invocations, [&](cudaStream_t stream, int64_t invocation) {
        for (const Segment& segment : segments) {
          segment.pair->Enqueue(stream, invocation, x_of(segment), y_of(segment));
        }
      });
  probe.report->Add(Record(kQuestion, form)
                        .Set("type", NameOf(step.type))
                        .Set("m", step.layer.m)
                        .Set("n", step.layer.n)
                        .Set("rows", step.rows)
                        .Set("large_rank", step.layer.RankAtEighths(kLargeEighths))
                        .Set("small_rank", step.layer.RankAtEighths(kSmallEighths))
                        .Set(timing)
                        .SetError(error, step.type == NumberType::kFp8 ? kFp8PairBar : kBf16Bar));
}

void MeasureStep(const Probe& probe, const Step& step) {
  const int64_t large = step.layer.RankAtEighths(kLargeEighths);
  const int64_t small = step.layer.RankAtEighths(kSmallEighths);
  const WeightPool& pool = probe.weights(step.type);
  const ColdWeights large_weights = CarvePair(pool, step.layer, large);
  // Both ranks' rows read one layer's factors, so the small pair lies inside the large one's copy
  // and finds it in the cache. Its B is contiguous here: strides have a question of their own.
  ColdWeights small_weights = CarvePair(pool, step.layer, small);
  small_weights.stride_bytes = large_weights.stride_bytes;
  small_weights.copies = large_weights.copies;
  const int64_t half = step.rows / 2;
  std::string reason;
  const auto create = [&](int64_t rank, int64_t rows, const ColdWeights& weights) {
    return PrefixPair::Create(probe, step.type, step.layer, rank, rows, false, weights, &reason);
  };
  const auto raised = create(large, step.rows, large_weights);
  const auto large_alone = create(large, half, large_weights);
  const auto small_alone = create(small, half, small_weights);
  if (raised == nullptr || large_alone == nullptr || small_alone == nullptr) {
    return probe.report->AddSkipped(kQuestion, NameOf(step.type), reason);
  }
  const int64_t invocations = MinInvocations(large_weights);
  MeasureSegments(probe, step, "raised", {{raised.get(), 0, step.rows}}, invocations);
  MeasureSegments(probe, step, "large", {{large_alone.get(), 0, half}}, invocations);
  MeasureSegments(probe, step, "segments",
                  {{large_alone.get(), 0, half}, {small_alone.get(), half, half}}, invocations);
}

}  // namespace

void MeasureCrossover(const Probe& probe) {
  for (const NumberType type : {NumberType::kBf16, NumberType::kFp8}) {
    for (const LayerShape layer : {LayerShape{2048, 8192}, LayerShape{4096, 4096}}) {
      for (const int64_t rows : kTotalRows) MeasureStep(probe, {type, layer, rows});
    }
  }
}

}  // namespace nestor::probe
