// FP8 planes: W ≈ s0 · p0 + s1 · p1 with p0 = e4m3(W / s0), p1 = e4m3((W − s0 p0) / s1), a scale
// per output, and rows of x quantised on the fly, a scale per row. How far from bf16 on real
// layers, and what do the quantising pass and the second plane cost?
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <vector>

#include "kernels/cuda/probe/pointwise.h"
#include "kernels/cuda/probe/probe.h"
#include "kernels/cuda/probe/product.h"
#include "kernels/cuda/probe/timing.h"

namespace nestor::probe {
namespace {

constexpr const char* kQuestion = "fp8 planes";
constexpr int64_t kErrorRows = 16;
// Rounding to e4m3 errs by 2.6e-2 in the mean square, a little more with a row's scale.
constexpr double kQuantiseBar = 4e-2;

struct NamedLayer {
  std::string name;
  LayerShape shape;
  std::vector<__nv_bfloat16> weights;  // [m, n]
};

template <typename T>
T ReadValue(std::ifstream& file) {
  T value{};
  file.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

// The format of export_weights.py.
std::vector<NamedLayer> ReadLayers(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  char magic[8] = {};
  file.read(magic, sizeof magic);
  if (!file || std::memcmp(magic, "NESTORPW", sizeof magic) != 0) {
    Fail(path + ": not a file of export_weights.py");
  }
  std::vector<NamedLayer> layers(ReadValue<uint64_t>(file));
  for (NamedLayer& layer : layers) {
    layer.name.resize(ReadValue<uint64_t>(file));
    file.read(layer.name.data(), static_cast<std::streamsize>(layer.name.size()));
    layer.shape.m = ReadValue<int64_t>(file);
    layer.shape.n = ReadValue<int64_t>(file);
    if (!file || layer.shape.m % 16 != 0 || layer.shape.n % 16 != 0) {
      Fail(path + ": truncated, or sizes of '" + layer.name + "' are no multiples of 16");
    }
    layer.weights.resize(static_cast<size_t>(layer.shape.m * layer.shape.n));
    file.read(reinterpret_cast<char*>(layer.weights.data()),
              static_cast<std::streamsize>(layer.weights.size() * 2));
    if (!file) Fail(path + ": truncated in '" + layer.name + "'");
  }
  return layers;
}

template <typename T>
std::vector<T> ToHost(const DeviceBuffer<T>& buffer) {
  std::vector<T> values(static_cast<size_t>(buffer.size()));
  buffer.CopyToHost(values.data());
  return values;
}

// Two planes of one layer and the rows that go through it, quantised by our own kernels.
struct QuantisedLayer {
  QuantisedLayer(const Probe& probe, const NamedLayer& layer)
      : shape(layer.shape),
        weights(shape.m * shape.n * 2),
        planes{DeviceBuffer<char>(shape.m * shape.n), DeviceBuffer<char>(shape.m * shape.n)},
        scales{DeviceBuffer<float>(shape.m), DeviceBuffer<float>(shape.m)},
        x(kErrorRows * shape.n),
        row_scales(kErrorRows) {
    const DeviceBuffer<float> wide(shape.m * shape.n), residual(shape.m * shape.n);
    weights.CopyFromHost(reinterpret_cast<const char*>(layer.weights.data()));
    Check(Widen(weights.data(), wide.size(), wide.data(), probe.stream));
    Check(QuantiseRows(wide.data(), NumberType::kFloat, shape.m, shape.n, planes[0].data(),
                       scales[0].data(), probe.stream));
    Check(SubtractPlane(wide.data(), planes[0].data(), scales[0].data(), shape.m, shape.n,
                        residual.data(), probe.stream));
    Check(QuantiseRows(residual.data(), NumberType::kFloat, shape.m, shape.n, planes[1].data(),
                       scales[1].data(), probe.stream));
    Check(QuantiseRows(probe.bf16_x, NumberType::kBf16, kErrorRows, shape.n, x.data(),
                       row_scales.data(), probe.stream));
    Check(cudaStreamSynchronize(probe.stream));
  }

  LayerShape shape;
  DeviceBuffer<char> weights;  // bf16
  DeviceBuffer<char> planes[2];
  DeviceBuffer<float> scales[2];
  DeviceBuffer<char> x;  // the first kErrorRows of the probe's rows, in fp8
  DeviceBuffer<float> row_scales;
};

std::vector<int64_t> All(int64_t extent) { return SpreadIndices(extent, extent); }

ProductShape ShapeOf(const LayerShape& layer, int64_t rows, NumberType type, NumberType output) {
  return {.outputs = layer.m, .inputs = layer.n, .rows = rows, .type = type, .output = output};
}

double Distance(const std::vector<double>& actual, const std::vector<double>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / norm);
}

// What the planes alone lose, with exact rows and sums: [0] one plane, [1] both.
std::vector<double> WeightErrors(const Probe& probe, const QuantisedLayer& layer,
                                 const std::vector<double>& expected) {
  const MatrixView x{probe.bf16_x, NumberType::kBf16, layer.shape.n, false};
  std::vector<double> sum(expected.size(), 0.0), errors;
  for (int plane = 0; plane < 2; ++plane) {
    const MatrixView weights{layer.planes[plane].data(), NumberType::kFp8, layer.shape.n, false};
    const std::vector<double> part = ToHost(ReferenceProduct(
        probe.stream, weights, All(layer.shape.m), x, All(kErrorRows), layer.shape.n));
    const std::vector<float> scales = ToHost(layer.scales[plane]);
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += scales[i % layer.shape.m] * part[i];
    errors.push_back(Distance(sum, expected));
  }
  return errors;
}

// The same with fp8 rows, by cublasLt with float sums and a pass that scales and adds. The worst
// error of the products themselves goes to *product_error.
std::vector<double> ServedErrors(const Probe& probe, const QuantisedLayer& layer,
                                 const DeviceBuffer<double>& expected, double* product_error,
                                 std::string* reason) {
  const LayerShape& shape = layer.shape;
  const int64_t size = kErrorRows * shape.m;
  const DeviceBuffer<float> sums[2] = {DeviceBuffer<float>(size), DeviceBuffer<float>(size)};
  const ProductShape product_shape =
      ShapeOf(shape, kErrorRows, NumberType::kFp8, NumberType::kFloat);
  std::vector<double> errors;
  *product_error = 0;
  for (int plane = 0; plane < 2; ++plane) {
    const ColdWeights weights{layer.planes[plane].data(), 0, 1};
    const auto product = Product::Create(*probe.lt, product_shape, probe.stream, weights,
                                         layer.x.data(), sums[plane].data(), reason);
    if (product == nullptr) return {};
    *product_error = WorseError(*product_error, CheckedError(*product, probe.stream, weights,
                                                             layer.x.data(), sums[plane].data()));
    Check(cudaMemsetAsync(probe.y, 0xff, size * 2, probe.stream));
    const PlaneSums planes{.sums0 = sums[0].data(),
                           .scales0 = layer.scales[0].data(),
                           .sums1 = plane == 1 ? sums[1].data() : nullptr,
                           .scales1 = layer.scales[1].data(),
                           .row_scales = layer.row_scales.data()};
    Check(CombinePlanes(planes, kErrorRows, shape.m, probe.y, probe.stream));
    errors.push_back(RelativeError(probe.stream, expected,
                                   {probe.y, NumberType::kBf16, shape.m, false}, kErrorRows,
                                   All(kErrorRows), shape.m, All(shape.m)));
  }
  return errors;
}

void MeasureLayerErrors(const Probe& probe, const NamedLayer& named) {
  const QuantisedLayer layer(probe, named);
  const LayerShape& shape = layer.shape;
  const MatrixView weights{layer.weights.data(), NumberType::kBf16, shape.n, false};
  const MatrixView x{probe.bf16_x, NumberType::kBf16, shape.n, false};
  const DeviceBuffer<double> expected =
      ReferenceProduct(probe.stream, weights, All(shape.m), x, All(kErrorRows), shape.n);
  std::string reason;
  const ColdWeights bf16{layer.weights.data(), 0, 1};
  const auto product =
      Product::Create(*probe.lt, ShapeOf(shape, kErrorRows, NumberType::kBf16, NumberType::kBf16),
                      probe.stream, bf16, probe.bf16_x, probe.y, &reason);
  if (product == nullptr) return probe.report->AddSkipped(kQuestion, named.name, reason);
  const double bf16_error = CheckedError(*product, probe.stream, bf16, probe.bf16_x, probe.y);
  const std::vector<double> by_weights = WeightErrors(probe, layer, ToHost(expected));
  double product_error = 0;
  const std::vector<double> served = ServedErrors(probe, layer, expected, &product_error, &reason);
  if (served.empty()) return probe.report->AddSkipped(kQuestion, named.name, reason);
  probe.report->Add(Record(kQuestion, "error")
                        .Set("layer", named.name)
                        .Set("m", shape.m)
                        .Set("n", shape.n)
                        .Set("bf16", bf16_error)
                        .Set("one_plane_exact_rows", by_weights[0])
                        .Set("one_plane_fp8_rows", served[0])
                        .Set("two_planes_exact_rows", by_weights[1])
                        .Set("two_planes_fp8_rows", served[1])
                        .SetError(WorseError(product_error, bf16_error), kBf16Bar));
}

// Relative error of the quantised rows, over a few of them.
double CheckedQuantiseError(const Probe& probe, int64_t rows, int64_t columns,
                            DeviceBuffer<char>* out, DeviceBuffer<float>* scales) {
  out->Poison();
  scales->Poison();
  Check(QuantiseRows(probe.bf16_x, NumberType::kBf16, rows, columns, out->data(), scales->data(),
                     probe.stream));
  Check(cudaStreamSynchronize(probe.stream));
  const std::vector<char> codes = ToHost(*out);
  const std::vector<float> row_scales = ToHost(*scales);
  std::vector<__nv_bfloat16> x(static_cast<size_t>(rows * columns));
  Check(cudaMemcpy(x.data(), probe.bf16_x, x.size() * 2, cudaMemcpyDeviceToHost));
  std::vector<double> actual, expected;
  for (const int64_t row : SpreadIndices(rows, 8)) {
    for (int64_t k = row * columns; k < (row + 1) * columns; ++k) {
      __nv_fp8_e4m3 code;
      std::memcpy(&code, &codes[k], 1);
      actual.push_back(double{row_scales[row]} * static_cast<float>(code));
      expected.push_back(static_cast<float>(x[k]));
    }
  }
  return Distance(actual, expected);
}

void MeasureQuantisingPass(const Probe& probe) {
  for (const int64_t columns : {576, 2048, 4096, 14336}) {
    for (const int64_t rows : kRows) {
      DeviceBuffer<char> out(rows * columns);
      DeviceBuffer<float> scales(rows);
      const double error = CheckedQuantiseError(probe, rows, columns, &out, &scales);
      // Rows come from the layer before, so they are in the cache: nothing rotates.
      const Timing timing = TimeInGraph(probe.stream, 64, [&](cudaStream_t stream, int64_t) {
        Check(QuantiseRows(probe.bf16_x, NumberType::kBf16, rows, columns, out.data(),
                           scales.data(), stream));
      });
      probe.report->Add(Record(kQuestion, "quantising pass")
                            .Set("n", columns)
                            .Set("rows", rows)
                            .Set("bytes", rows * columns * 3)
                            .Set(timing)
                            .SetError(error, kQuantiseBar));
    }
  }
}

// y = p0 x + p1 x by two products into one output.
void MeasureTwoPlanes(const Probe& probe, const LayerShape& layer, int64_t rows) {
  constexpr const char* kForm = "two planes, accumulated";
  ProductShape shape = ShapeOf(layer, rows, NumberType::kFp8, NumberType::kBf16);
  const ColdWeights first = probe.fp8_weights->Carve(2 * shape.weight_bytes());
  ColdWeights second = first;
  second.base += shape.weight_bytes();
  std::string reason;
  const auto coarse =
      Product::Create(*probe.lt, shape, probe.stream, first, probe.fp8_x, probe.y, &reason);
  shape.accumulate = true;
  const auto fine =
      Product::Create(*probe.lt, shape, probe.stream, second, probe.fp8_x, probe.y, &reason);
  if (coarse == nullptr || fine == nullptr) {
    return probe.report->AddSkipped(kQuestion, kForm, reason);
  }
  const auto enqueue = [&](cudaStream_t stream, int64_t invocation) {
    coarse->Enqueue(stream, first.copy(invocation), probe.fp8_x, probe.y);
    fine->Enqueue(stream, second.copy(invocation), probe.fp8_x, probe.y);
  };
  Check(cudaMemsetAsync(probe.y, 0xff, rows * layer.m * 2, probe.stream));
  enqueue(probe.stream, 0);
  const std::vector<int64_t> sampled = SpreadIndices(rows, 8), outputs = SpreadIndices(layer.m, 64);
  const auto part = [&](const Product& product, const ColdWeights& weights) {
    return ReferenceProduct(probe.stream, product.WeightView(weights.copy(0)), outputs,
                            product.InputView(probe.fp8_x), sampled, layer.n);
  };
  DeviceBuffer<double> reference = part(*coarse, first);
  AddReference(probe.stream, &reference, part(*fine, second));
  const double error = RelativeError(probe.stream, reference, coarse->OutputView(probe.y), rows,
                                     sampled, layer.m, outputs);
  const Timing timing = TimeInGraph(probe.stream, MinInvocations(first), enqueue);
  probe.report->Add(Record(kQuestion, kForm)
                        .Set("m", layer.m)
                        .Set("n", layer.n)
                        .Set("rows", rows)
                        .Set("bytes", 2 * (shape.weight_bytes() + shape.activation_bytes()))
                        .Set("flops", 2 * shape.flops())
                        .Set(timing)
                        .SetError(error, kBf16Bar));
}

// One plane with its scales per output and per row applied by the library.
void MeasureOuterScales(const Probe& probe, const LayerShape& layer, int64_t rows) {
  constexpr const char* kForm = "one plane, scales per output and row inside the product";
  ProductShape shape = ShapeOf(layer, rows, NumberType::kFp8, NumberType::kBf16);
  shape.outer_scales = true;
  const ColdWeights weights = probe.fp8_weights->Carve(shape.weight_bytes());
  std::string reason;
  const auto product =
      Product::Create(*probe.lt, shape, probe.stream, weights, probe.fp8_x, probe.y, &reason);
  if (product == nullptr) return probe.report->AddSkipped(kQuestion, kForm, reason);
  const std::vector<float> ones(static_cast<size_t>(std::max(layer.m, rows)), 1.0f);
  DeviceBuffer<float> scales(static_cast<int64_t>(ones.size()));
  scales.CopyFromHost(ones.data());
  product->SetScales(scales.data(), scales.data());
  const double error = CheckedError(*product, probe.stream, weights, probe.fp8_x, probe.y);
  const Timing timing = TimeInGraph(
      probe.stream, MinInvocations(weights), [&](cudaStream_t stream, int64_t invocation) {
        product->Enqueue(stream, weights.copy(invocation), probe.fp8_x, probe.y);
      });
  probe.report->Add(Record(kQuestion, kForm)
                        .Set("m", layer.m)
                        .Set("n", layer.n)
                        .Set("rows", rows)
                        .Set("bytes", shape.weight_bytes() + shape.activation_bytes())
                        .Set("flops", shape.flops())
                        .Set(timing)
                        .SetError(error, kBf16Bar));
}

}  // namespace

void MeasurePlanes(const Probe& probe) {
  MeasureQuantisingPass(probe);
  for (const LayerShape layer : {LayerShape{4096, 4096}, LayerShape{4096, 14336}}) {
    for (const int64_t rows : kRows) {
      MeasureTwoPlanes(probe, layer, rows);
      MeasureOuterScales(probe, layer, rows);
    }
  }
  if (probe.weights_path.empty()) {
    return probe.report->AddSkipped(kQuestion, "error", "no file of real weights was given");
  }
  for (const NamedLayer& layer : ReadLayers(probe.weights_path)) MeasureLayerErrors(probe, layer);
}

}  // namespace nestor::probe
