#include "compress/error_feedback.h"

#include <cblas.h>
#include <lapack.h>

#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nestor {
namespace {

constexpr double kDamping = 0.01;
// Rows at a time, and columns between two updates of all that follow.
constexpr int64_t kBlockRows = 256;
constexpr int64_t kBlockColumns = 32;

int Int(int64_t value) { return static_cast<int>(value); }

std::vector<int64_t> ByEnergy(std::span<const double> moment, int64_t in) {
  std::vector<int64_t> order(static_cast<size_t>(in));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return moment[static_cast<size_t>(a * in + a)] > moment[static_cast<size_t>(b * in + b)];
  });
  return order;
}

// The factor U of H^-1 = U^T U, upper, row-major, in place of H [n, n].
absl::Status FactorOfInverse(std::vector<double>* matrix, int64_t n) {
  const lapack_int size = static_cast<lapack_int>(n);
  // LAPACK reads columns: its lower triangle is the upper one here.
  const char lower = 'L';
  lapack_int error = 0;
  LAPACK_dpotrf(&lower, &size, matrix->data(), &size, &error);
  if (error == 0) LAPACK_dpotri(&lower, &size, matrix->data(), &size, &error);
  if (error == 0) LAPACK_dpotrf(&lower, &size, matrix->data(), &size, &error);
  if (error == 0) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("the inverse of a ", n, " x ", n, " moment cannot be factored: dpotrf ", error));
}

}  // namespace

absl::StatusOr<ErrorFeedback> ErrorFeedback::Of(std::span<const double> moment, int64_t in) {
  NESTOR_CHECK(static_cast<int64_t>(moment.size()) == in * in);
  ErrorFeedback feedback;
  feedback.in_ = in;
  feedback.order_ = ByEnergy(moment, in);
  double energy = 0;
  for (int64_t j = 0; j < in; ++j) energy += moment[static_cast<size_t>(j * in + j)];
  // No energy at all: any positive number, and nothing is fed back.
  const double damping = energy > 0 ? kDamping * energy / static_cast<double>(in) : 1;
  std::vector<double> ordered(moment.size());
  for (int64_t i = 0; i < in; ++i) {
    for (int64_t j = 0; j < in; ++j) {
      ordered[static_cast<size_t>(i * in + j)] = moment[static_cast<size_t>(
          feedback.order_[static_cast<size_t>(i)] * in + feedback.order_[static_cast<size_t>(j)])];
    }
    ordered[static_cast<size_t>(i * in + i)] += damping;
  }
  if (absl::Status status = FactorOfInverse(&ordered, in); !status.ok()) return status;
  feedback.shares_.resize(ordered.size());
  for (int64_t i = 0; i < in; ++i) {
    const double diagonal = ordered[static_cast<size_t>(i * in + i)];
    for (int64_t j = i; j < in; ++j) {
      const size_t index = static_cast<size_t>(i * in + j);
      feedback.shares_[index] = static_cast<float>(ordered[index] / diagonal);
    }
  }
  return feedback;
}

void ErrorFeedback::Round(float* weights, int64_t out, const RoundFunction& round) const {
  std::vector<float> wanted(static_cast<size_t>(std::min(out, kBlockRows) * in_));
  std::vector<float> errors(static_cast<size_t>(std::min(out, kBlockRows) * kBlockColumns));
  for (int64_t begin = 0; begin < out; begin += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, out - begin);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < in_; ++j) {
        wanted[static_cast<size_t>(i * in_ + j)] =
            weights[(begin + i) * in_ + order_[static_cast<size_t>(j)]];
      }
    }
    for (int64_t first = 0; first < in_; first += kBlockColumns) {
      const int64_t end = std::min(first + kBlockColumns, in_);
      for (int64_t i = 0; i < rows; ++i) {
        float* const row = wanted.data() + i * in_;
        for (int64_t j = first; j < end; ++j) {
          const int64_t column = order_[static_cast<size_t>(j)];
          const float rounded = round(begin + i, column, row[j]);
          const float error = row[j] - rounded;
          weights[(begin + i) * in_ + column] = rounded;
          errors[static_cast<size_t>(i * kBlockColumns + j - first)] = error;
          const float* const shares = shares_.data() + j * in_;
          for (int64_t k = j + 1; k < end; ++k) row[k] -= error * shares[k];
        }
      }
      if (end == in_) continue;
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, Int(rows), Int(in_ - end),
                  Int(end - first), -1, errors.data(), Int(kBlockColumns),
                  shares_.data() + first * in_ + end, Int(in_), 1, wanted.data() + end, Int(in_));
    }
  }
}

}  // namespace nestor
