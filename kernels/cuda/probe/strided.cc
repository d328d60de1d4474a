// Strided against contiguous prefixes: y = B_r z with B stored [m, R] (ld = R), [m, r] (ld = r), or
// rank-major [R, m], where a prefix is contiguous at every rank.
#include "kernels/cuda/probe/probe.h"
#include "kernels/cuda/probe/product.h"
#include "kernels/cuda/probe/timing.h"

namespace nestor::probe {
namespace {

constexpr const char* kQuestion = "strided";
constexpr int64_t kStridedRows[] = {1, 16, 256};

struct Layout {
  const char* name;
  bool strided;
  bool transposed;
};

constexpr Layout kLayouts[] = {
    {"ld = r", false, false}, {"ld = R", true, false}, {"rank-major", false, true}};

void Measure(const Probe& probe, const LayerShape& layer, NumberType type, int64_t rows,
             int eighths, const Layout& layout) {
  const int64_t rank = layer.RankAtEighths(eighths);
  ProductShape shape{.outputs = layer.m, .inputs = rank, .rows = rows, .type = type};
  shape.transposed = layout.transposed;
  if (layout.strided) shape.weight_ld = layer.max_rank();
  const int64_t stored =
      layout.strided ? layer.m * layer.max_rank() * BytesOf(type) : shape.weight_bytes();
  const ColdWeights weights = probe.weights(type).Carve(stored, shape.weight_bytes());
  // z: any random numbers of the type will do.
  const void* z = probe.x(type);
  const std::string form = std::string(NameOf(type)) + " " + layout.name;
  std::string reason;
  const auto product =
      Product::Create(*probe.lt, shape, probe.stream, weights, z, probe.y, &reason);
  if (product == nullptr) return probe.report->AddSkipped(kQuestion, form, reason);
  const double error = CheckedError(*product, probe.stream, weights, z, probe.y);
  const Timing timing = TimeInGraph(
      probe.stream, MinInvocations(weights), [&](cudaStream_t stream, int64_t invocation) {
        product->Enqueue(stream, weights.copy(invocation), z, probe.y);
      });
  probe.report->Add(Record(kQuestion, layout.name)
                        .Set("type", NameOf(type))
                        .Set("m", layer.m)
                        .Set("max_rank", layer.max_rank())
                        .Set("rank", rank)
                        .Set("rows", rows)
                        .Set("bytes", shape.weight_bytes() + shape.activation_bytes())
                        .Set(timing)
                        .SetError(error, kBf16Bar));
}

}  // namespace

void MeasureStridedPrefixes(const Probe& probe) {
  for (const LayerShape layer : {LayerShape{4096, 4096}, LayerShape{14336, 4096}}) {
    for (const NumberType type : {NumberType::kBf16, NumberType::kFp8}) {
      for (const int64_t rows : kStridedRows) {
        for (const int eighths : kEighths) {
          for (const Layout& layout : kLayouts) {
            Measure(probe, layer, type, rows, eighths, layout);
          }
        }
      }
    }
  }
}

}  // namespace nestor::probe
