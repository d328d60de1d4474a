#include "compress/decompose.h"

#include <cblas.h>
#include <lapack.h>

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

// Rows of W in double at a time: a head has tens of thousands.
constexpr int64_t kBlockRows = 2048;
// Components below this share of the largest are rounding noise on the input side, where
// eigenvalues are squares: sqrt of double's epsilon.
constexpr double kNegligible = 1.5e-8;

int Int(int64_t value) { return static_cast<int>(value); }

struct Eigen {
  std::vector<double> values;   // [n], descending
  std::vector<double> vectors;  // [n, n], eigenvector k in row k
};

// Of a symmetric matrix [n, n].
absl::StatusOr<Eigen> SymmetricEigen(std::vector<double> matrix, int64_t n) {
  Eigen eigen;
  eigen.values.resize(static_cast<size_t>(n));
  const char job = 'V';
  const char triangle = 'U';
  const lapack_int size = static_cast<lapack_int>(n);
  lapack_int error = 0;
  lapack_int num_doubles = -1;
  lapack_int num_ints = -1;
  double best_num_doubles = 0;
  lapack_int best_num_ints = 0;
  LAPACK_dsyevd(&job, &triangle, &size, matrix.data(), &size, eigen.values.data(),
                &best_num_doubles, &num_doubles, &best_num_ints, &num_ints, &error);
  num_doubles = static_cast<lapack_int>(best_num_doubles);
  num_ints = best_num_ints;
  std::vector<double> work(static_cast<size_t>(num_doubles));
  std::vector<lapack_int> int_work(static_cast<size_t>(num_ints));
  LAPACK_dsyevd(&job, &triangle, &size, matrix.data(), &size, eigen.values.data(), work.data(),
                &num_doubles, int_work.data(), &num_ints, &error);
  if (error != 0) {
    return absl::InternalError(absl::StrCat("the eigendecomposition of a ", n, " x ", n,
                                            " matrix failed: dsyevd ", error));
  }
  // LAPACK orders them ascending, each vector a column of a column-major matrix.
  std::reverse(eigen.values.begin(), eigen.values.end());
  for (int64_t k = 0; k < n / 2; ++k) {
    std::swap_ranges(matrix.begin() + k * n, matrix.begin() + (k + 1) * n,
                     matrix.begin() + (n - 1 - k) * n);
  }
  eigen.vectors = std::move(matrix);
  return eigen;
}

std::vector<double> SingularValues(const std::vector<double>& squares) {
  std::vector<double> values;
  for (const double square : squares) values.push_back(std::sqrt(std::max(square, 0.0)));
  return values;
}

// W^T W [in, in], both triangles.
std::vector<double> Gram(std::span<const float> weights, int64_t out, int64_t in) {
  std::vector<double> gram(static_cast<size_t>(in * in));
  std::vector<double> block;
  for (int64_t begin = 0; begin < out; begin += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, out - begin);
    block.assign(weights.begin() + begin * in, weights.begin() + (begin + rows) * in);
    cblas_dsyrk(CblasRowMajor, CblasUpper, CblasTrans, Int(in), Int(rows), 1, block.data(), Int(in),
                1, gram.data(), Int(in));
  }
  for (int64_t i = 0; i < in; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      gram[static_cast<size_t>(i * in + j)] = gram[static_cast<size_t>(j * in + i)];
    }
  }
  return gram;
}

// What each factor is multiplied and divided by; 1 where there is nothing to balance.
double Balance(double singular_value) { return singular_value > 0 ? std::sqrt(singular_value) : 1; }

absl::StatusOr<Decomposition> DecomposeOutputSide(std::span<const float> weights, int64_t m,
                                                  int64_t n, std::span<const double> moment,
                                                  int64_t rank) {
  const std::vector<double> w(weights.begin(), weights.end());
  std::vector<double> ws(w.size());
  cblas_dsymm(CblasRowMajor, CblasRight, CblasUpper, Int(m), Int(n), 1, moment.data(), Int(n),
              w.data(), Int(n), 0, ws.data(), Int(n));
  std::vector<double> c(static_cast<size_t>(m * m));
  cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, Int(m), Int(m), Int(n), 1, ws.data(), Int(n),
              w.data(), Int(n), 0, c.data(), Int(m));
  NESTOR_ASSIGN_OR_RETURN(const Eigen eigen, SymmetricEigen(std::move(c), m));
  Decomposition result;
  result.singular_values = SingularValues(eigen.values);
  result.rank = rank;
  std::vector<double> a(static_cast<size_t>(rank * n));
  if (rank > 0) {
    cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, Int(rank), Int(n), Int(m), 1,
                eigen.vectors.data(), Int(m), w.data(), Int(n), 0, a.data(), Int(n));
  }
  result.a.resize(a.size());
  result.bt.resize(static_cast<size_t>(rank * m));
  for (int64_t k = 0; k < rank; ++k) {
    const double balance = Balance(result.singular_values[static_cast<size_t>(k)]);
    for (int64_t j = 0; j < n; ++j) {
      const size_t index = static_cast<size_t>(k * n + j);
      result.a[index] = static_cast<float>(a[index] / balance);
    }
    for (int64_t i = 0; i < m; ++i) {
      const size_t index = static_cast<size_t>(k * m + i);
      result.bt[index] = static_cast<float>(eigen.vectors[index] * balance);
    }
  }
  return result;
}

// L with S = L L^T, [n, n]: eigenvectors times the roots of their eigenvalues, which exists for a
// singular S too.
absl::StatusOr<std::vector<double>> RootOf(std::span<const double> moment, int64_t n) {
  NESTOR_ASSIGN_OR_RETURN(const Eigen eigen,
                          SymmetricEigen(std::vector<double>(moment.begin(), moment.end()), n));
  std::vector<double> root(static_cast<size_t>(n * n));
  for (int64_t k = 0; k < n; ++k) {
    const double scale = std::sqrt(std::max(eigen.values[static_cast<size_t>(k)], 0.0));
    for (int64_t i = 0; i < n; ++i) {
      root[static_cast<size_t>(i * n + k)] = scale * eigen.vectors[static_cast<size_t>(k * n + i)];
    }
  }
  return root;
}

absl::StatusOr<Decomposition> DecomposeInputSide(std::span<const float> weights, int64_t m,
                                                 int64_t n, std::span<const double> moment,
                                                 int64_t rank) {
  NESTOR_ASSIGN_OR_RETURN(const std::vector<double> root, RootOf(moment, n));
  const std::vector<double> gram = Gram(weights, m, n);
  std::vector<double> product(gram.size());
  cblas_dsymm(CblasRowMajor, CblasLeft, CblasUpper, Int(n), Int(n), 1, gram.data(), Int(n),
              root.data(), Int(n), 0, product.data(), Int(n));
  std::vector<double> inner(gram.size());
  cblas_dgemm(CblasRowMajor, CblasTrans, CblasNoTrans, Int(n), Int(n), Int(n), 1, root.data(),
              Int(n), product.data(), Int(n), 0, inner.data(), Int(n));
  NESTOR_ASSIGN_OR_RETURN(const Eigen eigen, SymmetricEigen(std::move(inner), n));
  Decomposition result;
  result.singular_values = SingularValues(eigen.values);
  result.rank = rank;
  result.a.resize(static_cast<size_t>(rank * n));
  result.bt.resize(static_cast<size_t>(rank * m));
  if (rank == 0) return result;

  // Rows of P are (L v_k / s_k)^T; then z_k = W p_k and a_k = z_k^T W = p_k^T W^T W.
  std::vector<double> p(static_cast<size_t>(rank * n));
  cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, Int(rank), Int(n), Int(n), 1,
              eigen.vectors.data(), Int(n), root.data(), Int(n), 0, p.data(), Int(n));
  const double negligible = kNegligible * result.singular_values.front();
  for (int64_t k = 0; k < rank; ++k) {
    const double s = result.singular_values[static_cast<size_t>(k)];
    const double scale = s > negligible ? 1 / s : 0;
    for (int64_t j = 0; j < n; ++j) p[static_cast<size_t>(k * n + j)] *= scale;
  }
  std::vector<double> a(p.size());
  cblas_dsymm(CblasRowMajor, CblasRight, CblasUpper, Int(rank), Int(n), 1, gram.data(), Int(n),
              p.data(), Int(n), 0, a.data(), Int(n));
  std::vector<double> balance;
  for (int64_t k = 0; k < rank; ++k) {
    balance.push_back(Balance(result.singular_values[static_cast<size_t>(k)]));
    for (int64_t j = 0; j < n; ++j) {
      const size_t index = static_cast<size_t>(k * n + j);
      result.a[index] = static_cast<float>(a[index] / balance.back());
    }
  }
  std::vector<double> block;
  std::vector<double> z;
  for (int64_t begin = 0; begin < m; begin += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, m - begin);
    block.assign(weights.begin() + begin * n, weights.begin() + (begin + rows) * n);
    z.resize(static_cast<size_t>(rank * rows));
    cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, Int(rank), Int(rows), Int(n), 1, p.data(),
                Int(n), block.data(), Int(n), 0, z.data(), Int(rows));
    for (int64_t k = 0; k < rank; ++k) {
      for (int64_t i = 0; i < rows; ++i) {
        result.bt[static_cast<size_t>(k * m + begin + i)] = static_cast<float>(
            z[static_cast<size_t>(k * rows + i)] * balance[static_cast<size_t>(k)]);
      }
    }
  }
  return result;
}

}  // namespace

absl::StatusOr<Decomposition> Decompose(std::span<const float> weights, int64_t out, int64_t in,
                                        std::span<const double> moment, int64_t max_rank) {
  NESTOR_CHECK(static_cast<int64_t>(weights.size()) == out * in);
  NESTOR_CHECK(static_cast<int64_t>(moment.size()) == in * in);
  const int64_t rank = std::min({max_rank, out, in});
  return out <= in ? DecomposeOutputSide(weights, out, in, moment, rank)
                   : DecomposeInputSide(weights, out, in, moment, rank);
}

double OutputEnergy(std::span<const float> weights, int64_t out, int64_t in,
                    std::span<const double> moment) {
  const std::vector<double> gram = Gram(weights, out, in);
  double energy = 0;
  for (size_t i = 0; i < gram.size(); ++i) energy += gram[i] * moment[i];
  return energy;
}

}  // namespace nestor
