#include "compress/refit.h"

#include <cblas.h>
#include <lapack.h>

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/progress.h"
#include "base/status_macros.h"
#include "engine/engine.h"
#include "kernels/backend.h"

namespace nestor {
namespace {

// d of the header, as share of the mean input energy.
constexpr double kDamping = 0.1;

int Int(int64_t value) { return static_cast<int>(value); }

FactorView ViewOf(const FactorPair& factors) {
  return {.max_rank = factors.a.rank,
          .a = factors.a.codes.data(),
          .a_scales = factors.a.scales.data(),
          .bt = factors.bt.codes.data(),
          .bt_scales = factors.bt.scales.data()};
}

// Moments of the inputs that levels give a layer, and with those of the full level.
struct InputMoments {
  std::vector<double> own;    // E[x' x'^T] [n, n]
  std::vector<double> cross;  // E[x x'^T] [n, n]
};

// `inputs` [(num_levels + 1) rows, n]: the rows of each level, those of the full level last.
InputMoments MomentsOf(const std::vector<float>& inputs, int64_t num_levels, int64_t n) {
  const int64_t rows = static_cast<int64_t>(inputs.size()) / ((num_levels + 1) * n);
  const float scale = 1.0f / static_cast<float>(num_levels * rows);
  const float* const full = inputs.data() + num_levels * rows * n;
  std::vector<float> own(static_cast<size_t>(n * n));
  std::vector<float> cross(own.size());
  for (int64_t level = 0; level < num_levels; ++level) {
    const float* const cut = inputs.data() + level * rows * n;
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, Int(n), Int(n), Int(rows), scale, cut,
                Int(n), cut, Int(n), 1, own.data(), Int(n));
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, Int(n), Int(n), Int(rows), scale, full,
                Int(n), cut, Int(n), 1, cross.data(), Int(n));
  }
  return {.own = {own.begin(), own.end()}, .cross = {cross.begin(), cross.end()}};
}

// P [n, n] of the header.
absl::StatusOr<std::vector<double>> GuessOfInputs(const InputMoments& moments, int64_t n) {
  double energy = 0;
  for (int64_t i = 0; i < n; ++i) energy += moments.own[static_cast<size_t>(i * n + i)];
  // An input that is always zero keeps its layer: P = I.
  const double damping = energy > 0 ? kDamping * energy / static_cast<double>(n) : 1;
  std::vector<double> left = moments.own;
  std::vector<double> guess = moments.cross;
  for (int64_t i = 0; i < n; ++i) {
    left[static_cast<size_t>(i * n + i)] += damping;
    guess[static_cast<size_t>(i * n + i)] += damping;
  }
  // P left = right with a symmetric left. A row of `guess` is a column to LAPACK.
  const char triangle = 'U';
  const lapack_int size = static_cast<lapack_int>(n);
  lapack_int error = 0;
  LAPACK_dposv(&triangle, &size, &size, left.data(), &size, guess.data(), &size, &error);
  if (error != 0) {
    return absl::InternalError(
        absl::StrCat("the moments of ", n, " inputs cannot be solved: dposv ", error));
  }
  return guess;
}

// W P [out, in] for W [out, in].
std::vector<float> Product(const std::vector<float>& weights, const std::vector<double>& guess,
                           int64_t out, int64_t in) {
  const std::vector<float> right(guess.begin(), guess.end());
  std::vector<float> product(weights.size());
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, Int(out), Int(in), Int(in), 1,
              weights.data(), Int(in), right.data(), Int(in), 0, product.data(), Int(in));
  return product;
}

// A backend that refits each layer before it first runs it. Its layers are numbered as they are
// loaded, which is the model's order; the inner backend gets a layer when its turn comes.
class RefittingBackend final : public Backend {
 public:
  RefittingBackend(std::unique_ptr<Backend> inner, const NestedModel* artifact,
                   const NestedModel* source, const RefitOptions* options, const KeepRefitted* keep,
                   Progress* progress)
      : inner_(std::move(inner)),
        artifact_(artifact),
        source_(source),
        options_(options),
        keep_(keep),
        progress_(progress) {}

  const absl::Status& status() const { return status_; }

  absl::StatusOr<LinearId> LoadLinear(const LinearWeights& weights) override {
    const size_t layer = inner_ids_.size();
    inner_ids_.push_back(kNone);
    if (options_->ranks[layer] == 0) {
      NESTOR_ASSIGN_OR_RETURN(inner_ids_[layer], inner_->LoadLinear(weights));
    }
    return static_cast<LinearId>(layer);
  }

  void Linear(const LinearCall& call) override {
    if (!status_.ok()) return;
    status_ = RefitAndRun(call);
  }

  void Embed(const EmbedCall& call) override {
    EmbedCall inner = call;
    if (call.linear != kNone) inner.linear = inner_ids_[static_cast<size_t>(call.linear)];
    inner_->Embed(inner);
  }

  absl::StatusOr<VectorId> LoadVector(std::span<const float> values) override {
    return inner_->LoadVector(values);
  }
  absl::StatusOr<TableId> LoadTable(std::span<const float> values, int64_t rows,
                                    int64_t cols) override {
    return inner_->LoadTable(values, rows, cols);
  }
  absl::StatusOr<Tensor> Allocate(int64_t rows, int64_t cols) override {
    return inner_->Allocate(rows, cols);
  }
  absl::Status AllocateKvCache(const KvCacheShape& shape) override {
    return inner_->AllocateKvCache(shape);
  }
  void Norm(const NormCall& call) override { inner_->Norm(call); }
  void Activation(const ActivationCall& call) override { inner_->Activation(call); }
  void Attention(const AttentionCall& call) override { inner_->Attention(call); }
  void Pool(const PoolCall& call) override { inner_->Pool(call); }
  void Gather(const Tensor& in, std::span<const int64_t> rows, const Tensor& out) override {
    inner_->Gather(in, rows, out);
  }
  void Read(const Tensor& in, int64_t row_begin, int64_t rows, float* out) override {
    inner_->Read(in, row_begin, rows, out);
  }
  LinearCost executed() const override { return inner_->executed(); }
  int64_t resident_weight_bytes() const override { return inner_->resident_weight_bytes(); }
  int64_t kv_cache_bytes() const override { return inner_->kv_cache_bytes(); }
  int64_t KvCacheBytes(const KvCacheShape& shape) const override {
    return inner_->KvCacheBytes(shape);
  }

 private:
  absl::Status RefitAndRun(const LinearCall& call) {
    NESTOR_RETURN_IF_ERROR(RefitLayersOf(call));
    std::vector<LinearPart> parts(call.parts.begin(), call.parts.end());
    for (LinearPart& part : parts) part.layer = inner_ids_[static_cast<size_t>(part.layer)];
    LinearCall inner = call;
    inner.parts = parts;
    inner_->Linear(inner);
    return absl::OkStatus();
  }

  absl::Status RefitLayersOf(const LinearCall& call) {
    const auto waits = [&](const LinearPart& part) {
      return inner_ids_[static_cast<size_t>(part.layer)] == kNone;
    };
    if (std::none_of(call.parts.begin(), call.parts.end(), waits)) return absl::OkStatus();
    const int64_t n = call.in.cols;
    std::vector<float> inputs(static_cast<size_t>(call.rows * n));
    inner_->Read(call.in, 0, call.rows, inputs.data());
    const InputMoments moments =
        MomentsOf(inputs, static_cast<int64_t>(options_->levels.size()), n);
    NESTOR_ASSIGN_OR_RETURN(const std::vector<double> guess, GuessOfInputs(moments, n));
    for (const LinearPart& part : call.parts) {
      if (!waits(part)) continue;
      NESTOR_RETURN_IF_ERROR(Refit(static_cast<size_t>(part.layer), guess, moments.own));
    }
    return absl::OkStatus();
  }

  absl::Status Refit(size_t layer, const std::vector<double>& guess,
                     const std::vector<double>& moment) {
    const LinearSpec& spec = artifact_->layers()[layer];
    std::vector<float> scratch;
    NESTOR_ASSIGN_OR_RETURN(LinearWeights weights, artifact_->Weights(layer, &scratch));
    NESTOR_ASSIGN_OR_RETURN(const std::vector<float> original, source_->SourceWeight(layer));
    const std::vector<float> target = Product(original, guess, spec.out, spec.in);
    NESTOR_ASSIGN_OR_RETURN(const Decomposition decomposition,
                            Decompose(target, spec.out, spec.in, moment, options_->ranks[layer]));
    const FactorPair factors = QuantisePair(decomposition, spec.out, spec.in);
    weights.prefix = ViewOf(factors);
    NESTOR_ASSIGN_OR_RETURN(inner_ids_[layer], inner_->LoadLinear(weights));
    progress_->Advance(spec.out * spec.in);
    return (*keep_)({.layer = layer,
                     .weights = target,
                     .moment = moment,
                     .decomposition = decomposition,
                     .factors = factors});
  }

  const std::unique_ptr<Backend> inner_;
  const NestedModel* const artifact_;
  const NestedModel* const source_;
  const RefitOptions* const options_;
  const KeepRefitted* const keep_;
  Progress* const progress_;
  std::vector<LinearId> inner_ids_;  // by layer; kNone until it is refitted
  absl::Status status_;
};

}  // namespace

absl::Status RefitFactors(std::unique_ptr<NestedModel> artifact, const NestedModel& source,
                          const TokenSequences& sequences, const RefitOptions& options,
                          const BackendFactory& make_backend, const KeepRefitted& keep) {
  NESTOR_CHECK(!options.levels.empty() && !sequences.empty());
  const int64_t copies = static_cast<int64_t>(options.levels.size()) + 1;
  const int full = static_cast<int>(artifact->levels().size()) - 1;
  int64_t weights = 0;
  for (size_t layer = 0; layer < options.ranks.size(); ++layer) {
    const LinearSpec& spec = artifact->layers()[layer];
    if (options.ranks[layer] > 0) weights += spec.out * spec.in;
  }
  Progress progress("Refitting", weights);

  const ModelSpec spec = artifact->spec();
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<Backend> inner, make_backend());
  EngineOptions engine_options{.max_step_rows = copies * CountTokens(sequences),
                               .max_sequences = copies * static_cast<int64_t>(sequences.size())};
  int64_t pages = 0;
  for (const std::vector<int32_t>& sequence : sequences) {
    const int64_t size = static_cast<int64_t>(sequence.size()) + engine_options.page_size - 1;
    pages += copies * (size / engine_options.page_size);
  }
  engine_options.kv_cache_bytes = inner->KvCacheBytes({.num_layers = spec.num_blocks,
                                                       .num_kv_heads = spec.num_kv_heads,
                                                       .head_dim = spec.head_dim,
                                                       .page_size = engine_options.page_size,
                                                       .num_pages = pages});
  auto backend = std::make_unique<RefittingBackend>(std::move(inner), artifact.get(), &source,
                                                    &options, &keep, &progress);
  const RefittingBackend& refitting = *backend;
  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                          Engine::Create(std::move(artifact), std::move(backend), engine_options));

  // The engine lays rows out by level, as `levels` name them, the full level last.
  StepPlan plan;
  std::vector<int> levels = options.levels;
  levels.push_back(full);
  for (const int level : levels) {
    for (const std::vector<int32_t>& sequence : sequences) {
      NESTOR_ASSIGN_OR_RETURN(const SequenceId id,
                              engine->AddSequence(static_cast<int64_t>(sequence.size())));
      plan.entries.push_back({.sequence = id,
                              .tokens = sequence,
                              .level = level,
                              .output = StepEntry::Output::kNone,
                              .targets = {}});
    }
  }
  const absl::Status stepped = engine->Step(plan).status();
  NESTOR_RETURN_IF_ERROR(refitting.status());
  return stepped;
}

}  // namespace nestor
