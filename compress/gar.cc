#include "compress/gar.h"

#include <cblas.h>
#include <lapack.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/bfloat16.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

constexpr int64_t kLeastGarShare = 4;    // of the full rank, one part in
constexpr int64_t kLeastGarSaving = 16;  // of the plain factors' FLOPs, one part in
// Rows of W in double at a time: a head has tens of thousands.
constexpr int64_t kBlockRows = 2048;
// Added to the moment of z, as share of its mean diagonal: inputs may span less than the rank. The
// least that makes the moment positive definite, as moments are accumulated in fp32.
constexpr double kLeastDamping = 1e-9;
constexpr double kLargestDamping = 1e-2;
constexpr double kDampingStep = 100;
// Most pivots that are set apart from the others, in a group of z that a few large values rule.
constexpr int64_t kMostOutliers = 8;

int Int(int64_t value) { return static_cast<int>(value); }

absl::Status LapackError(const char* routine, int64_t rank, lapack_int error) {
  return absl::InternalError(absl::StrCat("gar pair of rank ", rank, ": ", routine, " ", error));
}

// All rows of Z [out, rank], the directions of the output that are kept, each of length 1: those
// that span the most first. Weighing directions by their energy chose pivots that lose 1 % more
// (SmolLM2, measured).
absl::StatusOr<std::vector<int32_t>> PivotedRows(const Decomposition& decomposition, int64_t out,
                                                 int64_t rank) {
  // A row of Z is a column to LAPACK.
  std::vector<double> z(static_cast<size_t>(rank * out));
  for (int64_t k = 0; k < rank; ++k) {
    const double s = decomposition.singular_values[static_cast<size_t>(k)];
    const double scale = s > 0 ? 1 / std::sqrt(s) : 0;
    for (int64_t i = 0; i < out; ++i) {
      z[static_cast<size_t>(i * rank + k)] =
          scale * decomposition.bt[static_cast<size_t>(k * out + i)];
    }
  }
  const lapack_int m = static_cast<lapack_int>(rank);
  const lapack_int n = static_cast<lapack_int>(out);
  std::vector<lapack_int> pivots(static_cast<size_t>(out));
  std::vector<double> reflectors(static_cast<size_t>(rank));
  lapack_int error = 0;
  lapack_int work_size = -1;
  double best_work_size = 0;
  LAPACK_dgeqp3(&m, &n, z.data(), &m, pivots.data(), reflectors.data(), &best_work_size, &work_size,
                &error);
  work_size = static_cast<lapack_int>(best_work_size);
  std::vector<double> work(static_cast<size_t>(work_size));
  LAPACK_dgeqp3(&m, &n, z.data(), &m, pivots.data(), reflectors.data(), work.data(), &work_size,
                &error);
  if (error != 0) return LapackError("dgeqp3", rank, error);
  std::vector<int32_t> rows;
  for (const lapack_int pivot : pivots) rows.push_back(static_cast<int32_t>(pivot - 1));
  return rows;
}

// A [rank, in]: the pivots' rows of B_r A_r.
std::vector<float> PivotOutputs(const Decomposition& decomposition,
                                const std::vector<int32_t>& rows, int64_t out, int64_t in,
                                int64_t rank) {
  const std::vector<double> a(decomposition.a.begin(), decomposition.a.begin() + rank * in);
  std::vector<double> b(static_cast<size_t>(rank * rank));
  for (int64_t i = 0; i < rank; ++i) {
    for (int64_t k = 0; k < rank; ++k) {
      b[static_cast<size_t>(i * rank + k)] =
          decomposition.bt[static_cast<size_t>(k * out + rows[static_cast<size_t>(i)])];
    }
  }
  std::vector<double> product(a.size());
  cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, Int(rank), Int(in), Int(rank), 1, b.data(),
              Int(rank), a.data(), Int(in), 0, product.data(), Int(in));
  return {product.begin(), product.end()};
}

// `count` rows of `weights` from place `first` of the order on, in double.
std::vector<double> OrderedRows(std::span<const float> weights, int64_t in,
                                const std::vector<int32_t>& rows, int64_t first, int64_t count) {
  std::vector<double> block;
  block.reserve(static_cast<size_t>(count * in));
  for (int64_t i = first; i < first + count; ++i) {
    const float* const row = weights.data() + rows[static_cast<size_t>(i)] * in;
    block.insert(block.end(), row, row + in);
  }
  return block;
}

// B^T [rank, out - rank]: W S A^T (A S A^T)^-1 of the rows behind the pivots.
absl::StatusOr<std::vector<float>> FitOthers(std::span<const float> weights, int64_t out,
                                             int64_t in, std::span<const double> moment,
                                             const std::vector<int32_t>& rows,
                                             const std::vector<double>& a, int64_t rank) {
  std::vector<double> as(a.size());  // A S [rank, in]
  cblas_dsymm(CblasRowMajor, CblasRight, CblasUpper, Int(rank), Int(in), 1, moment.data(), Int(in),
              a.data(), Int(in), 0, as.data(), Int(in));
  std::vector<double> gram(static_cast<size_t>(rank * rank));
  cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, Int(rank), Int(rank), Int(in), 1, as.data(),
              Int(in), a.data(), Int(in), 0, gram.data(), Int(rank));
  double trace = 0;
  for (int64_t k = 0; k < rank; ++k) trace += gram[static_cast<size_t>(k * rank + k)];
  const char triangle = 'U';
  const lapack_int size = static_cast<lapack_int>(rank);
  lapack_int error = 0;
  std::vector<double> damped;
  for (double damping = kLeastDamping; damping <= kLargestDamping; damping *= kDampingStep) {
    // Outputs that are always zero are guessed as zero.
    const double added = trace > 0 ? damping * trace / static_cast<double>(rank) : 1;
    damped = gram;
    for (int64_t k = 0; k < rank; ++k) damped[static_cast<size_t>(k * rank + k)] += added;
    LAPACK_dpotrf(&triangle, &size, damped.data(), &size, &error);
    if (error == 0) break;
  }
  if (error != 0) return LapackError("dpotrf", rank, error);

  const int64_t others = out - rank;
  std::vector<float> bt(static_cast<size_t>(rank * others));
  for (int64_t begin = 0; begin < others; begin += kBlockRows) {
    const int64_t count = std::min(kBlockRows, others - begin);
    const std::vector<double> block = OrderedRows(weights, in, rows, rank + begin, count);
    // A row of the product is a column to LAPACK.
    std::vector<double> b(static_cast<size_t>(count * rank));
    cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, Int(count), Int(rank), Int(in), 1,
                block.data(), Int(in), as.data(), Int(in), 0, b.data(), Int(rank));
    const lapack_int columns = static_cast<lapack_int>(count);
    LAPACK_dpotrs(&triangle, &size, &columns, damped.data(), &size, b.data(), &size, &error);
    if (error != 0) return LapackError("dpotrs", rank, error);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < rank; ++k) {
        bt[static_cast<size_t>(k * others + begin + i)] =
            static_cast<float>(b[static_cast<size_t>(i * rank + k)]);
      }
    }
  }
  return bt;
}

// E||W x - B A x||^2 over rows of W in the given order from `first` on; bt is [rank, their count].
double LostEnergy(std::span<const float> weights, int64_t in, std::span<const double> moment,
                  const std::vector<int32_t>& rows, int64_t first, const std::vector<double>& a,
                  const std::vector<float>& bt, int64_t rank) {
  const int64_t total = std::ssize(rows) - first;
  double energy = 0;
  for (int64_t begin = 0; begin < total; begin += kBlockRows) {
    const int64_t count = std::min(kBlockRows, total - begin);
    std::vector<double> lost = OrderedRows(weights, in, rows, first + begin, count);
    std::vector<double> b(static_cast<size_t>(rank * count));
    for (int64_t k = 0; k < rank; ++k) {
      std::copy_n(bt.begin() + k * total + begin, count, b.begin() + k * count);
    }
    cblas_dgemm(CblasRowMajor, CblasTrans, CblasNoTrans, Int(count), Int(in), Int(rank), -1,
                b.data(), Int(count), a.data(), Int(in), 1, lost.data(), Int(in));
    std::vector<double> product(lost.size());
    cblas_dsymm(CblasRowMajor, CblasRight, CblasUpper, Int(count), Int(in), 1, moment.data(),
                Int(in), lost.data(), Int(in), 0, product.data(), Int(in));
    energy += cblas_ddot(Int(count * in), lost.data(), 1, product.data(), 1);
  }
  return energy;
}

std::vector<double> Dequantised(const FactorCodes& factor) {
  const std::vector<float> values = DequantiseFactor(factor);
  return {values.begin(), values.end()};
}

FactorPair FirstComponents(const Decomposition& decomposition, int64_t out, int64_t in,
                           int64_t rank) {
  const auto quantised = [rank](const std::vector<float>& values, int64_t size) {
    return QuantiseFactor(std::span(values).first(static_cast<size_t>(rank * size)), rank, size);
  };
  return {.a = quantised(decomposition.a, in), .bt = quantised(decomposition.bt, out)};
}

FactorCodes FirstRows(const FactorCodes& factor, int64_t rank) {
  return {.rank = rank,
          .size = factor.size,
          .codes = {factor.codes.begin(), factor.codes.begin() + rank * PaddedToGroup(factor.size)},
          .scales = {factor.scales.begin(), factor.scales.begin() + rank * NumGroups(factor.size)}};
}

// B A [out, in].
std::vector<float> ProductOf(const FactorPair& factors) {
  const int64_t rank = factors.a.rank, in = factors.a.size, out = factors.bt.size;
  const std::vector<double> a = Dequantised(factors.a);
  const std::vector<double> bt = Dequantised(factors.bt);
  std::vector<float> product;
  product.reserve(static_cast<size_t>(out * in));
  for (int64_t begin = 0; begin < out; begin += kBlockRows) {
    const int64_t count = std::min(kBlockRows, out - begin);
    std::vector<double> block(static_cast<size_t>(count * in));
    cblas_dgemm(CblasRowMajor, CblasTrans, CblasNoTrans, Int(count), Int(in), Int(rank), 1,
                bt.data() + begin, Int(out), a.data(), Int(in), 0, block.data(), Int(in));
    product.insert(product.end(), block.begin(), block.end());
  }
  return product;
}

double LostByPlainFactors(const FactorPair& factors, std::span<const float> weights, int64_t in,
                          std::span<const double> moment) {
  std::vector<int32_t> rows(static_cast<size_t>(factors.bt.size));
  std::iota(rows.begin(), rows.end(), 0);
  return LostEnergy(weights, in, moment, rows, 0, Dequantised(factors.a),
                    DequantiseFactor(factors.bt), factors.a.rank);
}

double LostByPair(const GarPair& pair, std::span<const float> weights, int64_t in,
                  std::span<const double> moment) {
  const int64_t rank = pair.a.rank;
  const std::vector<double> a = Dequantised(pair.a);
  const std::vector<int32_t> pivots(pair.rows.begin(), pair.rows.begin() + rank);
  std::vector<float> identity(static_cast<size_t>(rank * rank));
  for (int64_t k = 0; k < rank; ++k) identity[static_cast<size_t>(k * rank + k)] = 1;
  return LostEnergy(weights, in, moment, pivots, 0, a, identity, rank) +
         LostEnergy(weights, in, moment, pair.rows, rank, a, DequantiseFactor(pair.bt), rank);
}

// Kernels round z_k s_k to int8 in groups, z = A x and s_k the largest scale of B's component k.
struct PivotEnergies {
  std::vector<double> z;     // [rank], E[(z_k s_k)^2]
  std::vector<double> gain;  // [rank], the energy that one unit of z_k s_k has in the other outputs
};

PivotEnergies EnergiesOf(const GarPair& pair, std::span<const double> moment) {
  const int64_t rank = pair.a.rank, in = pair.a.size, others = pair.bt.size;
  const std::vector<double> a = Dequantised(pair.a);
  const std::vector<double> bt = Dequantised(pair.bt);
  std::vector<double> as(a.size());  // A S
  cblas_dsymm(CblasRowMajor, CblasRight, CblasUpper, Int(rank), Int(in), 1, moment.data(), Int(in),
              a.data(), Int(in), 0, as.data(), Int(in));
  PivotEnergies energies;
  for (int64_t k = 0; k < rank; ++k) {
    const auto scales = pair.bt.scales.begin() + k * NumGroups(others);
    double s = 0;
    for (int64_t g = 0; g < NumGroups(others); ++g) {
      s = std::max<double>(s, FloatFromBfloat16(scales[g]));
    }
    const double z = cblas_ddot(Int(in), a.data() + k * in, 1, as.data() + k * in, 1);
    const double* const b = bt.data() + k * others;
    energies.z.push_back(z * s * s);
    energies.gain.push_back(s > 0 ? cblas_ddot(Int(others), b, 1, b, 1) / (s * s) : 0);
  }
  return energies;
}

// What rounding in groups adds to the other outputs, in some unit: the step of a group is as its
// largest value.
double RoundingEnergy(const PivotEnergies& energies, const std::vector<size_t>& order) {
  double sum = 0;
  for (size_t begin = 0; begin < order.size(); begin += kGroupSize) {
    double largest = 0;
    double gain = 0;
    for (size_t i = begin; i < std::min<size_t>(order.size(), begin + kGroupSize); ++i) {
      largest = std::max(largest, energies.z[order[i]]);
      gain += energies.gain[order[i]];
    }
    sum += largest * gain;
  }
  return sum;
}

// Pivots by size, the largest first; but in the first group the `outliers` largest have the company
// of those that matter least to the other outputs.
std::vector<size_t> PivotOrder(const PivotEnergies& energies, int64_t outliers) {
  std::vector<size_t> order(energies.z.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const auto by_size = [&](size_t a, size_t b) { return energies.z[a] > energies.z[b]; };
  std::stable_sort(order.begin(), order.end(), by_size);
  if (outliers == 0 || std::ssize(order) <= kGroupSize) return order;
  const auto first = order.begin() + outliers;
  std::stable_sort(first, order.end(),
                   [&](size_t a, size_t b) { return energies.gain[a] < energies.gain[b]; });
  std::stable_sort(order.begin() + kGroupSize, order.end(), by_size);
  return order;
}

FactorCodes OrderedComponents(const FactorCodes& factor, const std::vector<size_t>& order) {
  const int64_t codes = PaddedToGroup(factor.size), scales = NumGroups(factor.size);
  FactorCodes ordered = {.rank = factor.rank, .size = factor.size, .codes = {}, .scales = {}};
  for (const size_t k : order) {
    const auto row = static_cast<int64_t>(k);
    const auto code = factor.codes.begin() + row * codes;
    ordered.codes.insert(ordered.codes.end(), code, code + codes);
    const auto scale = factor.scales.begin() + row * scales;
    ordered.scales.insert(ordered.scales.end(), scale, scale + scales);
  }
  return ordered;
}

// The same pair with its pivots in an order that lets z be rounded to int8 in groups, neighbours of
// one size. As QR chooses them, rounding takes 1 to 18 parts in a thousand of the others' energy,
// in this order half of that (SmolLM2).
void OrderPivots(std::span<const double> moment, GarPair* pair) {
  const PivotEnergies energies = EnergiesOf(*pair, moment);
  std::vector<size_t> best = PivotOrder(energies, 0);
  double least = RoundingEnergy(energies, best);
  for (int64_t outliers = 1; outliers <= std::min(kMostOutliers, pair->a.rank); ++outliers) {
    std::vector<size_t> order = PivotOrder(energies, outliers);
    const double energy = RoundingEnergy(energies, order);
    if (energy >= least) continue;
    least = energy;
    best = std::move(order);
  }
  pair->a = OrderedComponents(pair->a, best);
  pair->bt = OrderedComponents(pair->bt, best);
  const std::vector<int32_t> rows = pair->rows;
  for (size_t i = 0; i < best.size(); ++i) pair->rows[i] = rows[best[i]];
}

// The pair of the first components of `decomposition`, that of `weights`.
absl::StatusOr<GarPair> FitPair(const Decomposition& decomposition, std::span<const float> weights,
                                int64_t out, int64_t in, std::span<const double> moment,
                                int64_t rank) {
  NESTOR_CHECK(rank > 0 && rank <= decomposition.rank && rank < out);
  GarPair pair;
  NESTOR_ASSIGN_OR_RETURN(pair.rows, PivotedRows(decomposition, out, rank));
  pair.a = QuantiseFactor(PivotOutputs(decomposition, pair.rows, out, in, rank), rank, in);
  NESTOR_ASSIGN_OR_RETURN(
      const std::vector<float> bt,
      FitOthers(weights, out, in, moment, pair.rows, Dequantised(pair.a), rank));
  pair.bt = QuantiseFactor(bt, rank, out - rank);
  OrderPivots(moment, &pair);
  return pair;
}

}  // namespace

FormAndRank CheapestPrefix(int64_t out, int64_t in, int64_t rank, bool may_be_gar) {
  const bool is_gar = may_be_gar && kLeastGarShare * rank >= std::min(out, in) &&
                      kLeastGarSaving * rank >= out + in && rank < out;
  return {is_gar ? Form::kGar : Form::kPrefix, rank};
}

absl::StatusOr<GarFit> FitGar(const Decomposition& decomposition, std::span<const float> weights,
                              int64_t out, int64_t in, std::span<const double> moment,
                              int64_t rank) {
  GarFit fit;
  NESTOR_ASSIGN_OR_RETURN(fit.pair, FitPair(decomposition, weights, out, in, moment, rank));
  const double energy = OutputEnergy(weights, out, in, moment);
  if (energy <= 0) return fit;
  fit.error = LostByPair(fit.pair, weights, in, moment) / energy;
  fit.plain_error =
      LostByPlainFactors(FirstComponents(decomposition, out, in, rank), weights, in, moment) /
      energy;
  return fit;
}

absl::StatusOr<GarFit> FitGarToFactors(const FactorPair& factors, std::span<const float> weights,
                                       int64_t out, int64_t in, std::span<const double> moment,
                                       int64_t rank) {
  NESTOR_CHECK(factors.a.rank >= rank && factors.bt.rank >= rank);
  const FactorPair first = {.a = FirstRows(factors.a, rank), .bt = FirstRows(factors.bt, rank)};
  const std::vector<float> product = ProductOf(first);
  NESTOR_ASSIGN_OR_RETURN(const Decomposition decomposition,
                          Decompose(product, out, in, moment, rank));
  GarFit fit;
  NESTOR_ASSIGN_OR_RETURN(fit.pair, FitPair(decomposition, product, out, in, moment, rank));
  const double energy = OutputEnergy(weights, out, in, moment);
  if (energy <= 0) return fit;
  fit.plain_error = LostByPlainFactors(first, weights, in, moment) / energy;
  fit.error = fit.plain_error + LostByPair(fit.pair, product, in, moment) / energy;
  return fit;
}

}  // namespace nestor
