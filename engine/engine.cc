#include "engine/engine.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "engine/kv_pages.h"
#include "engine/transformer.h"

namespace nestor {
namespace {

// Rows whose logits are on the device at once; more are done in chunks.
constexpr int64_t kMaxOutputRows = 64;

struct Sequence {
  int64_t length = 0;
  int64_t max_length = 0;
  std::vector<int32_t> pages;
};

// log(sum exp(logits)), with the sum of blocks in double.
double LogSumExp(std::span<const float> logits) {
  constexpr size_t kBlock = 1024;
  const float highest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const size_t end = std::min(begin + kBlock, logits.size());
    float block = 0;
    for (size_t i = begin; i < end; ++i) block += std::exp(logits[i] - highest);
    sum += block;
  }
  return highest + std::log(sum);
}

bool IsFinite(std::span<const float> values) {
  // x - x is 0 or NaN. Independent lanes let the compiler vectorise the sum.
  constexpr size_t kLanes = 16;
  float lanes[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane] - values[i + lane];
  }
  float sum = 0;
  for (; i < values.size(); ++i) sum += values[i] - values[i];
  for (const float lane : lanes) sum += lane;
  return sum == 0;
}

absl::Status NonFiniteError() {
  return absl::InternalError("the activations of this sequence are not finite");
}

// Rows of logits that an entry wants back.
size_t NumLogits(const StepEntry& entry) {
  if (entry.output == StepEntry::Output::kAllLogits) return entry.tokens.size();
  return entry.output == StepEntry::Output::kLastLogits ? 1 : 0;
}

// Rows whose outputs a step must deliver.
struct OutputRow {
  int64_t row = 0;
  int level = 0;
  size_t entry = 0;
  size_t token = 0;  // within the entry
};

class TransformerEngine final : public Engine {
 public:
  TransformerEngine(std::unique_ptr<NestedModel> model, std::unique_ptr<Backend> backend,
                    std::unique_ptr<Tokenizer> tokenizer,
                    std::unique_ptr<ChatTemplate> chat_template, const EngineOptions& options)
      : options_(options),
        model_(std::move(model)),
        backend_(std::move(backend)),
        tokenizer_(std::move(tokenizer)),
        chat_template_(std::move(chat_template)),
        pages_(0, options.page_size),
        raiser_(&model_->layers(), &model_->levels(), model_->dense_storage(), backend_.get()) {}

  absl::Status Load();

  const NestedModel& model() const override { return *model_; }
  const Tokenizer& tokenizer() const override { return *tokenizer_; }
  const ChatTemplate* chat_template() const override { return chat_template_.get(); }
  const EngineOptions& options() const override { return options_; }
  const Backend& backend() const override { return *backend_; }
  int64_t max_sequence_length() const override { return max_sequence_length_; }
  int64_t free_pages() const override { return pages_.num_free(); }
  int64_t num_pages() const override { return pages_.num_pages(); }
  void SetObserver(LinearInputObserver* observer) override { transformer_->SetObserver(observer); }

  bool HasRoomFor(int64_t max_length) const override;
  absl::StatusOr<SequenceId> AddSequence(int64_t max_length) override;
  void RemoveSequence(SequenceId sequence) override;
  int64_t LengthOf(SequenceId sequence) const override;
  void Truncate(SequenceId sequence, int64_t length) override;
  absl::Status Step(const StepPlan& plan, StepResult* result) override;

 private:
  bool has_cache() const { return !model_->spec().is_encoder(); }
  // Room for what a step of decoding may hold, so that none has to grow it.
  void ReserveScratch();
  absl::Status Validate(const StepPlan& plan) const;
  absl::Status ValidateEntry(const StepEntry& entry) const;
  // Fills in executed_.
  void ChooseLevels(const StepPlan& plan);
  void LayOutRows(const StepPlan& plan);
  void DeliverLogits(const StepPlan& plan, StepResult* result);
  void DeliverChunk(const StepPlan& plan, std::span<const OutputRow> rows, StepResult* result);
  void DeliverEmbeddings(const StepPlan& plan, StepResult* result);

  const EngineOptions options_;
  const std::unique_ptr<NestedModel> model_;
  const std::unique_ptr<Backend> backend_;
  const std::unique_ptr<Tokenizer> tokenizer_;
  const std::unique_ptr<ChatTemplate> chat_template_;
  std::unique_ptr<Transformer> transformer_;
  // By level: rows of lower order come first, so that a layer's groups stay contiguous.
  std::vector<int> level_order_;
  int64_t max_sequence_length_ = 0;

  KvPages pages_;
  std::unordered_map<SequenceId, Sequence> sequences_;
  SequenceId next_sequence_ = 1;

  LevelRaiser raiser_;

  // The rows of the step in hand; kept so that a steady step does not allocate.
  std::vector<LevelRaiser::Entry> executed_;  // entry by entry of the plan
  std::vector<size_t> entry_order_;
  std::vector<int32_t> tokens_, positions_, types_;
  std::vector<SequenceRows> sequence_rows_;  // in row order
  std::vector<size_t> entry_of_sequence_rows_;
  std::vector<LevelRun> runs_, output_runs_;
  std::vector<OutputRow> outputs_;
  std::vector<int64_t> output_rows_;
  std::vector<float> chunk_;   // [kMaxOutputRows, vocabulary]
  std::vector<float> values_;  // what StepResult's spans point to
  std::vector<double> log_probabilities_;
};

void TransformerEngine::ReserveScratch() {
  // An entry has a row at least.
  const auto sequences =
      static_cast<size_t>(std::min(options_.max_sequences, options_.max_step_rows));
  const auto rows = static_cast<size_t>(options_.max_step_rows);
  const size_t levels = model_->levels().size();
  executed_.reserve(sequences);
  entry_order_.reserve(sequences);
  sequence_rows_.reserve(sequences);
  entry_of_sequence_rows_.reserve(sequences);
  tokens_.reserve(rows);
  positions_.reserve(rows);
  types_.reserve(rows);
  outputs_.reserve(rows);
  output_rows_.reserve(kMaxOutputRows);
  runs_.reserve(levels);
  output_runs_.reserve(levels);
  const ModelSpec& spec = model_->spec();
  values_.reserve(sequences *
                  static_cast<size_t>(has_cache() ? spec.vocabulary : spec.output_size()));
}

absl::Status TransformerEngine::Load() {
  const ModelSpec& spec = model_->spec();
  NESTOR_ASSIGN_OR_RETURN(transformer_, Transformer::Load(model_.get(), backend_.get(),
                                                          options_.max_step_rows, kMaxOutputRows));
  model_->tensors().DropPages();
  ReserveScratch();
  const auto order_of = [](const Level& level) {
    if (level.ladder == "prefix") return 0;
    if (level.ladder == "mixed") return 1;
    return level.ladder == "residual" ? 2 : 3;
  };
  const int num_levels = static_cast<int>(model_->levels().size());
  for (int i = 0; i < num_levels; ++i) {
    level_order_.push_back(order_of(model_->levels()[static_cast<size_t>(i)]) * num_levels + i);
  }
  max_sequence_length_ = spec.context_length;
  if (!has_cache()) {
    max_sequence_length_ = std::min(max_sequence_length_, options_.max_step_rows);
    return absl::OkStatus();
  }
  KvCacheShape shape = {.num_layers = spec.num_blocks,
                        .num_kv_heads = spec.num_kv_heads,
                        .head_dim = spec.head_dim,
                        .page_size = options_.page_size,
                        .num_pages = 1};
  const int64_t page_bytes = backend_->KvCacheBytes(shape);
  const int64_t pages_of_context =
      (spec.context_length + options_.page_size - 1) / options_.page_size;
  const int64_t num_pages =
      std::min(options_.kv_cache_bytes / page_bytes, pages_of_context * options_.max_sequences);
  if (num_pages < 1) {
    return absl::ResourceExhaustedError(absl::StrCat("kv_cache_bytes: one page needs ", page_bytes,
                                                     " bytes; was ", options_.kv_cache_bytes));
  }
  shape.num_pages = num_pages;
  NESTOR_RETURN_IF_ERROR(backend_->AllocateKvCache(shape));
  pages_ = KvPages(num_pages, options_.page_size);
  max_sequence_length_ = std::min(max_sequence_length_, num_pages * options_.page_size);
  return absl::OkStatus();
}

bool TransformerEngine::HasRoomFor(int64_t max_length) const {
  if (max_length > max_sequence_length_) return false;
  if (static_cast<int64_t>(sequences_.size()) >= options_.max_sequences) return false;
  return !has_cache() || pages_.PagesFor(max_length) <= pages_.num_free();
}

absl::StatusOr<SequenceId> TransformerEngine::AddSequence(int64_t max_length) {
  if (max_length < 1 || max_length > max_sequence_length_) {
    return absl::InvalidArgumentError(absl::StrCat("sequence length: must be in [1, ",
                                                   max_sequence_length_, "]; was ", max_length));
  }
  if (!HasRoomFor(max_length)) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "no room for a sequence of ", max_length, " positions: ", sequences_.size(),
        " sequences run, ", pages_.num_free(), " of ", pages_.num_pages(), " KV pages are free"));
  }
  const SequenceId id = next_sequence_++;
  Sequence& sequence = sequences_[id];
  sequence.max_length = max_length;
  if (has_cache()) sequence.pages = pages_.Take(pages_.PagesFor(max_length));
  return id;
}

void TransformerEngine::RemoveSequence(SequenceId sequence) {
  const auto found = sequences_.find(sequence);
  NESTOR_CHECK(found != sequences_.end());
  pages_.Return(found->second.pages);
  sequences_.erase(found);
}

int64_t TransformerEngine::LengthOf(SequenceId sequence) const {
  const auto found = sequences_.find(sequence);
  NESTOR_CHECK(found != sequences_.end());
  return found->second.length;
}

void TransformerEngine::Truncate(SequenceId sequence, int64_t length) {
  const auto found = sequences_.find(sequence);
  NESTOR_CHECK(found != sequences_.end());
  NESTOR_CHECK(length >= 0 && length <= found->second.length);
  found->second.length = length;
}

absl::Status TransformerEngine::ValidateEntry(const StepEntry& entry) const {
  const auto found = sequences_.find(entry.sequence);
  if (found == sequences_.end()) {
    return absl::InvalidArgumentError(absl::StrCat("sequence ", entry.sequence, " is unknown"));
  }
  const Sequence& sequence = found->second;
  const int64_t num_tokens = static_cast<int64_t>(entry.tokens.size());
  if (num_tokens == 0 || sequence.length + num_tokens > sequence.max_length) {
    return absl::InvalidArgumentError(absl::StrCat("sequence ", entry.sequence, ": ", num_tokens,
                                                   " tokens after ", sequence.length,
                                                   ", reserved for ", sequence.max_length));
  }
  if (!has_cache() && sequence.length != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequence ", entry.sequence, ": an encoder takes its input in one step"));
  }
  if (entry.level < 0 || entry.level >= static_cast<int>(model_->levels().size())) {
    return absl::InvalidArgumentError(absl::StrCat(
        "level: must be in [0, ", model_->levels().size() - 1, "]; was ", entry.level));
  }
  for (size_t i = 0; i < entry.tokens.size(); ++i) {
    if (entry.tokens[i] < 0 || entry.tokens[i] >= model_->spec().vocabulary) {
      return absl::InvalidArgumentError(absl::StrCat("token ", i, ": id must be in [0, ",
                                                     model_->spec().vocabulary, "); was ",
                                                     entry.tokens[i]));
    }
  }
  if (entry.second_text < entry.tokens.size() && model_->spec().num_token_types < 2) {
    return absl::InvalidArgumentError("second text: the model tells no second text from a first");
  }
  const bool wants_embedding = entry.output == StepEntry::Output::kEmbedding;
  if (wants_embedding == has_cache() && entry.output != StepEntry::Output::kNone) {
    return absl::InvalidArgumentError(has_cache() ? "embeddings: the model is no encoder"
                                                  : "logits: the model is an encoder");
  }
  if (entry.output != StepEntry::Output::kLogProbabilities) return absl::OkStatus();
  if (entry.targets.size() != entry.tokens.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(entry.targets.size(), " targets for ", entry.tokens.size(), " tokens"));
  }
  for (const int32_t target : entry.targets) {
    if (target < -1 || target >= model_->spec().vocabulary) {
      return absl::InvalidArgumentError(absl::StrCat("target: id must be in [-1, ",
                                                     model_->spec().vocabulary, "); was ", target));
    }
  }
  return absl::OkStatus();
}

absl::Status TransformerEngine::Validate(const StepPlan& plan) const {
  if (plan.entries.empty()) return absl::InvalidArgumentError("the step plan is empty");
  int64_t rows = 0;
  for (size_t i = 0; i < plan.entries.size(); ++i) {
    NESTOR_RETURN_IF_ERROR(ValidateEntry(plan.entries[i]));
    rows += static_cast<int64_t>(plan.entries[i].tokens.size());
    for (size_t j = 0; j < i; ++j) {
      if (plan.entries[j].sequence == plan.entries[i].sequence) {
        return absl::InvalidArgumentError(
            absl::StrCat("sequence ", plan.entries[i].sequence, " is in the step plan twice"));
      }
    }
  }
  if (rows > options_.max_step_rows) {
    return absl::InvalidArgumentError(absl::StrCat("the step plan has ", rows,
                                                   " rows, at most max_step_rows (",
                                                   options_.max_step_rows, ") fit"));
  }
  return absl::OkStatus();
}

void TransformerEngine::ChooseLevels(const StepPlan& plan) {
  executed_.clear();
  for (const StepEntry& entry : plan.entries) {
    executed_.push_back({.rows = static_cast<int64_t>(entry.tokens.size()),
                         .level = entry.level,
                         .may_run = entry.may_run});
  }
  raiser_.Raise(executed_);
}

// Sorts the entries by level order and lays their tokens out as rows.
void TransformerEngine::LayOutRows(const StepPlan& plan) {
  entry_order_.resize(plan.entries.size());
  for (size_t i = 0; i < entry_order_.size(); ++i) entry_order_[i] = i;
  // By level and then as planned: a stable sort would allocate.
  std::sort(entry_order_.begin(), entry_order_.end(), [&](size_t a, size_t b) {
    const int order_a = level_order_[static_cast<size_t>(executed_[a].level)];
    const int order_b = level_order_[static_cast<size_t>(executed_[b].level)];
    return order_a != order_b ? order_a < order_b : a < b;
  });
  tokens_.clear();
  positions_.clear();
  types_.clear();
  sequence_rows_.clear();
  entry_of_sequence_rows_.clear();
  runs_.clear();
  outputs_.clear();
  for (const size_t index : entry_order_) {
    const StepEntry& entry = plan.entries[index];
    const int level = executed_[index].level;
    const Sequence& sequence = sequences_.at(entry.sequence);
    const int64_t begin = static_cast<int64_t>(tokens_.size());
    const int64_t count = static_cast<int64_t>(entry.tokens.size());
    tokens_.insert(tokens_.end(), entry.tokens.begin(), entry.tokens.end());
    for (int64_t i = 0; i < count; ++i) {
      positions_.push_back(static_cast<int32_t>(sequence.length + i));
      types_.push_back(static_cast<size_t>(i) >= entry.second_text ? 1 : 0);
    }
    sequence_rows_.push_back({begin, count, sequence.length, sequence.pages});
    entry_of_sequence_rows_.push_back(index);
    if (!runs_.empty() && runs_.back().level == level) {
      runs_.back().end = begin + count;
    } else {
      runs_.push_back({begin, begin + count, level});
    }
    if (entry.output == StepEntry::Output::kLastLogits) {
      outputs_.push_back({begin + count - 1, level, index, entry.tokens.size() - 1});
    }
    if (entry.output == StepEntry::Output::kAllLogits ||
        entry.output == StepEntry::Output::kLogProbabilities) {
      const bool is_scored = entry.output == StepEntry::Output::kLogProbabilities;
      for (size_t i = 0; i < entry.tokens.size(); ++i) {
        if (is_scored && entry.targets[i] < 0) continue;
        outputs_.push_back({begin + static_cast<int64_t>(i), level, index, i});
      }
    }
  }
}

void TransformerEngine::DeliverLogits(const StepPlan& plan, StepResult* result) {
  const size_t vocabulary = static_cast<size_t>(model_->spec().vocabulary);
  size_t num_logits = 0;
  size_t num_scored = 0;
  for (const StepEntry& entry : plan.entries) {
    num_logits += NumLogits(entry);
    if (entry.output == StepEntry::Output::kLogProbabilities) num_scored += entry.tokens.size();
  }
  values_.resize(num_logits * vocabulary);
  log_probabilities_.assign(num_scored, 0.0);
  chunk_.resize(static_cast<size_t>(kMaxOutputRows) * vocabulary);
  num_logits = 0;
  num_scored = 0;
  for (size_t i = 0; i < plan.entries.size(); ++i) {
    const size_t count = NumLogits(plan.entries[i]);
    result->entries[i].values =
        std::span(values_).subspan(num_logits * vocabulary, count * vocabulary);
    num_logits += count;
    if (plan.entries[i].output == StepEntry::Output::kLogProbabilities) {
      const size_t scored = plan.entries[i].tokens.size();
      result->entries[i].log_probabilities =
          std::span(log_probabilities_).subspan(num_scored, scored);
      num_scored += scored;
    }
  }
  for (size_t begin = 0; begin < outputs_.size(); begin += kMaxOutputRows) {
    const size_t count = std::min<size_t>(kMaxOutputRows, outputs_.size() - begin);
    DeliverChunk(plan, std::span(outputs_).subspan(begin, count), result);
  }
}

void TransformerEngine::DeliverChunk(const StepPlan& plan, std::span<const OutputRow> rows,
                                     StepResult* result) {
  const size_t vocabulary = static_cast<size_t>(model_->spec().vocabulary);
  output_rows_.clear();
  output_runs_.clear();
  for (const OutputRow& output : rows) {
    const int64_t index = static_cast<int64_t>(output_rows_.size());
    output_rows_.push_back(output.row);
    if (!output_runs_.empty() && output_runs_.back().level == output.level) {
      output_runs_.back().end = index + 1;
    } else {
      output_runs_.push_back({index, index + 1, output.level});
    }
  }
  transformer_->Logits(output_rows_, output_runs_, chunk_.data());
  for (size_t i = 0; i < rows.size(); ++i) {
    const std::span<const float> logits = std::span(chunk_).subspan(i * vocabulary, vocabulary);
    StepResult::Entry& entry = result->entries[rows[i].entry];
    if (!IsFinite(logits)) {
      entry.status = NonFiniteError();
      continue;
    }
    const StepEntry& planned = plan.entries[rows[i].entry];
    if (!entry.values.empty()) {
      const size_t row =
          planned.output == StepEntry::Output::kAllLogits ? rows[i].token : size_t{0};
      std::copy(logits.begin(), logits.end(),
                values_.begin() + (entry.values.data() - values_.data()) +
                    static_cast<std::ptrdiff_t>(row * vocabulary));
    } else {
      const int32_t target = planned.targets[rows[i].token];
      const size_t offset =
          static_cast<size_t>(entry.log_probabilities.data() - log_probabilities_.data());
      log_probabilities_[offset + rows[i].token] =
          logits[static_cast<size_t>(target)] - LogSumExp(logits);
    }
  }
}

void TransformerEngine::DeliverEmbeddings(const StepPlan& plan, StepResult* result) {
  const auto width = static_cast<size_t>(model_->spec().output_size());
  values_.resize(plan.entries.size() * width);
  for (size_t begin = 0; begin < sequence_rows_.size(); begin += kMaxOutputRows) {
    const size_t count = std::min<size_t>(kMaxOutputRows, sequence_rows_.size() - begin);
    transformer_->Pool(std::span(sequence_rows_).subspan(begin, count),
                       values_.data() + begin * width);
  }
  for (size_t i = 0; i < sequence_rows_.size(); ++i) {
    const size_t index = entry_of_sequence_rows_[i];
    if (plan.entries[index].output != StepEntry::Output::kEmbedding) continue;
    StepResult::Entry& entry = result->entries[index];
    entry.values = std::span(values_).subspan(i * width, width);
    if (!IsFinite(entry.values)) entry.status = NonFiniteError();
  }
}

absl::Status TransformerEngine::Step(const StepPlan& plan, StepResult* result) {
  NESTOR_RETURN_IF_ERROR(Validate(plan));
  ChooseLevels(plan);
  LayOutRows(plan);
  const LinearCost before = backend_->executed();
  transformer_->Forward({.tokens = tokens_,
                         .positions = positions_,
                         .types = types_,
                         .sequences = sequence_rows_,
                         .runs = runs_});
  result->entries.resize(plan.entries.size());
  for (size_t i = 0; i < plan.entries.size(); ++i) {
    result->entries[i] = {.executed_level = executed_[i].level};
    sequences_.at(plan.entries[i].sequence).length +=
        static_cast<int64_t>(plan.entries[i].tokens.size());
  }
  if (has_cache()) {
    DeliverLogits(plan, result);
  } else {
    DeliverEmbeddings(plan, result);
  }
  const LinearCost after = backend_->executed();
  result->executed = {after.weight_bytes - before.weight_bytes, after.flops - before.flops};
  return absl::OkStatus();
}

absl::Status Validate(const EngineOptions& options) {
  for (const auto& [name, value] : {std::pair("max_step_rows", options.max_step_rows),
                                    std::pair("kv_cache_bytes", options.kv_cache_bytes),
                                    std::pair("max_sequences", options.max_sequences),
                                    std::pair("page_size", options.page_size)}) {
    if (value < 1) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": must be positive; was ", value));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<StepResult> Engine::Step(const StepPlan& plan) {
  StepResult result;
  NESTOR_RETURN_IF_ERROR(Step(plan, &result));
  return result;
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(std::unique_ptr<NestedModel> model,
                                                       std::unique_ptr<Backend> backend,
                                                       const EngineOptions& options) {
  NESTOR_RETURN_IF_ERROR(Validate(options));
  const std::string& directory = model->directory();
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer =
      Tokenizer::Load(directory + "/tokenizer.json");
  if (absl::IsNotFound(tokenizer.status())) {
    return absl::FailedPreconditionError(tokenizer.status().message());
  }
  NESTOR_RETURN_IF_ERROR(tokenizer.status());
  absl::StatusOr<std::unique_ptr<ChatTemplate>> chat_template = ChatTemplate::Load(directory);
  if (absl::IsNotFound(chat_template.status())) chat_template = nullptr;
  NESTOR_RETURN_IF_ERROR(chat_template.status());
  auto engine = std::make_unique<TransformerEngine>(std::move(model), std::move(backend),
                                                    *std::move(tokenizer),
                                                    *std::move(chat_template), options);
  NESTOR_RETURN_IF_ERROR(engine->Load());
  return engine;
}

}  // namespace nestor
