#include "tests/testing/fake_engine.h"

#include <cmath>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/file.h"
#include "tests/testing/temporary_directory.h"

namespace nestor {
namespace {

// Byte-level BPE without merges: the id of a byte is its value, as GPT-2 spells bytes.
std::string ByteTokenizerJson() {
  nlohmann::json vocabulary = nlohmann::json::object();
  int next_extra = 256;  // bytes that do not print are spelt with the code points from here on
  for (int byte = 0; byte < 256; ++byte) {
    const bool prints =
        (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    const int code = prints ? byte : next_extra++;
    std::string spelling;
    if (code < 0x80) {
      spelling += static_cast<char>(code);
    } else {
      spelling += static_cast<char>(0xc0 | (code >> 6));
      spelling += static_cast<char>(0x80 | (code & 0x3f));
    }
    vocabulary[spelling] = byte;
  }
  nlohmann::json byte_level = {{"type", "ByteLevel"},
                               {"add_prefix_space", false},
                               {"trim_offsets", true},
                               {"use_regex", true}};
  nlohmann::json tokenizer = {{"version", "1.0"},
                              {"truncation", nullptr},
                              {"padding", nullptr},
                              {"added_tokens", nlohmann::json::array()},
                              {"normalizer", nullptr},
                              {"pre_tokenizer", byte_level},
                              {"post_processor", nullptr},
                              {"decoder", byte_level},
                              {"model",
                               {{"type", "BPE"},
                                {"dropout", nullptr},
                                {"unk_token", nullptr},
                                {"continuing_subword_prefix", nullptr},
                                {"end_of_word_suffix", nullptr},
                                {"fuse_unk", false},
                                {"byte_fallback", false},
                                {"vocab", vocabulary},
                                {"merges", nlohmann::json::array()}}}};
  return tokenizer.dump();
}

std::unique_ptr<Tokenizer> MakeByteTokenizer() {
  const TemporaryDirectory directory;
  const std::string path = directory.path() + "/tokenizer.json";
  NESTOR_CHECK(WriteFileAtomically(path, ByteTokenizerJson()).ok());
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(path);
  if (!tokenizer.ok()) std::fprintf(stderr, "%s\n", tokenizer.status().ToString().c_str());
  NESTOR_CHECK(tokenizer.ok());
  return *std::move(tokenizer);
}

constexpr int64_t kVocabulary = 256;

}  // namespace

void FakeEngineControl::AllowSteps(int64_t count) {
  MutexLock lock(&mutex_);
  num_allowed_ = count;
  changed_.NotifyAll();
}

void FakeEngineControl::WaitForSteps(int64_t count) {
  MutexLock lock(&mutex_);
  while (static_cast<int64_t>(steps_.size()) < count) changed_.Wait(&mutex_);
}

void FakeEngineControl::FailToken(int32_t token) {
  MutexLock lock(&mutex_);
  failing_token_ = token;
}

std::vector<FakeEngineControl::RecordedStep> FakeEngineControl::steps() const {
  MutexLock lock(&mutex_);
  return steps_;
}

int64_t FakeEngineControl::free_pages() const {
  MutexLock lock(&mutex_);
  return free_pages_;
}

void FakeEngineControl::Begin(RecordedStep step) {
  MutexLock lock(&mutex_);
  steps_.push_back(std::move(step));
  const int64_t turn = static_cast<int64_t>(steps_.size());
  changed_.NotifyAll();
  while (turn > num_allowed_) changed_.Wait(&mutex_);
}

bool FakeEngineControl::Fails(int32_t token) const {
  MutexLock lock(&mutex_);
  return token == failing_token_;
}

void FakeEngineControl::SetFreePages(int64_t count) {
  MutexLock lock(&mutex_);
  free_pages_ = count;
}

FakeEngine::FakeEngine(const FakeEngineOptions& options, FakeEngineControl* control)
    : options_(options), control_(control), tokenizer_(MakeByteTokenizer()) {
  SetFreePages(options_.num_pages);
}

const NestedModel& FakeEngine::model() const {
  std::fprintf(stderr, "a FakeEngine has no model\n");
  std::abort();
}

const Backend& FakeEngine::backend() const {
  std::fprintf(stderr, "a FakeEngine has no backend\n");
  std::abort();
}

void FakeEngine::SetFreePages(int64_t count) {
  free_pages_ = count;
  control_->SetFreePages(count);
}

int64_t FakeEngine::PagesFor(int64_t length) const {
  return (length + options_.engine.page_size - 1) / options_.engine.page_size;
}

bool FakeEngine::HasRoomFor(int64_t max_length) const {
  return static_cast<int64_t>(sequences_.size()) < options_.engine.max_sequences &&
         PagesFor(max_length) <= free_pages_;
}

absl::StatusOr<SequenceId> FakeEngine::AddSequence(int64_t max_length) {
  if (max_length > options_.max_sequence_length) {
    return absl::InvalidArgumentError(absl::StrCat("too long: ", max_length));
  }
  if (!HasRoomFor(max_length)) return absl::ResourceExhaustedError("no room");
  sequences_[next_sequence_] = {.max_length = max_length};
  SetFreePages(free_pages_ - PagesFor(max_length));
  return next_sequence_++;
}

void FakeEngine::RemoveSequence(SequenceId sequence) {
  const auto found = sequences_.find(sequence);
  NESTOR_CHECK(found != sequences_.end());
  SetFreePages(free_pages_ + PagesFor(found->second.max_length));
  sequences_.erase(found);
}

int64_t FakeEngine::LengthOf(SequenceId sequence) const { return sequences_.at(sequence).length; }

void FakeEngine::Truncate(SequenceId sequence, int64_t length) {
  Sequence& truncated = sequences_.at(sequence);
  NESTOR_CHECK(length >= 0 && length <= truncated.length);
  truncated.length = length;
}

int32_t FakeEngine::NextToken(int32_t token, int level) const {
  const bool errs = options_.low_levels_err_at > 0 && level < options_.num_levels - 1 &&
                    token % options_.low_levels_err_at == 0;
  return (token + (errs ? 2 : 1)) % kVocabulary;
}

absl::Status FakeEngine::Step(const StepPlan& plan, StepResult* result) {
  if (plan.entries.empty()) return absl::InvalidArgumentError("empty plan");
  int64_t rows = 0;
  FakeEngineControl::RecordedStep recorded;
  for (const StepEntry& entry : plan.entries) {
    Sequence& sequence = sequences_.at(entry.sequence);
    recorded.push_back({entry.sequence, sequence.length, static_cast<int64_t>(entry.tokens.size()),
                        entry.level, entry.output});
    sequence.length += static_cast<int64_t>(entry.tokens.size());
    rows += static_cast<int64_t>(entry.tokens.size());
    if (sequence.length > sequence.max_length) return absl::InvalidArgumentError("outgrown");
    if (entry.level < 0 || entry.level >= options_.num_levels) {
      return absl::InvalidArgumentError("no such level");
    }
  }
  if (rows > options_.engine.max_step_rows) return absl::InvalidArgumentError("too many rows");
  control_->Begin(std::move(recorded));

  // Poisoned, so that nothing of an earlier step is ever read.
  for (Output& output : outputs_) output.values.assign(output.values.size(), NAN);
  outputs_.resize(plan.entries.size());
  *result = {};
  for (size_t i = 0; i < plan.entries.size(); ++i) {
    const StepEntry& entry = plan.entries[i];
    Output& output = outputs_[i];
    StepResult::Entry ran;
    ran.executed_level = entry.level;
    for (const int32_t token : entry.tokens) {
      if (control_->Fails(token)) ran.status = absl::InternalError("non-finite activations");
    }
    if (entry.output == StepEntry::Output::kLastLogits ||
        entry.output == StepEntry::Output::kAllLogits) {
      const std::span<const int32_t> tokens =
          entry.output == StepEntry::Output::kAllLogits ? entry.tokens : entry.tokens.last(1);
      output.values.assign(tokens.size() * kVocabulary, 0);
      for (size_t t = 0; t < tokens.size(); ++t) {
        const int32_t next = NextToken(tokens[t], entry.level);
        output.values[t * kVocabulary + static_cast<size_t>(next)] = 1;
      }
      ran.values = output.values;
    } else if (entry.output == StepEntry::Output::kEmbedding) {
      output.values = {static_cast<float>(entry.level), static_cast<float>(entry.tokens.size()),
                       static_cast<float>(entry.tokens.front()),
                       static_cast<float>(entry.tokens.back())};
      ran.values = output.values;
    } else if (entry.output == StepEntry::Output::kLogProbabilities) {
      output.log_probabilities.clear();
      for (size_t t = 0; t < entry.tokens.size(); ++t) {
        output.log_probabilities.push_back(
            entry.targets[t] < 0 ? 0.0 : -(1000.0 * entry.tokens[t] + entry.targets[t]));
      }
      ran.log_probabilities = output.log_probabilities;
    }
    result->entries.push_back(ran);
  }
  return absl::OkStatus();
}

ServedModel FakeEngine::Describe() const {
  ServedModel model;
  model.name = "fake";
  model.architecture = options_.is_encoder ? "FakeEncoder" : "FakeModel";
  model.dtype = "none";
  model.device = "fake";
  model.is_encoder = options_.is_encoder;
  model.max_sequence_length = options_.max_sequence_length;
  model.vocabulary = kVocabulary;
  model.hidden = 4;
  const int n = options_.num_levels;
  for (int i = 0; i < n; ++i) {
    ServedLevel level;
    level.form = i == n - 1 ? "full" : "residual";
    level.relative_cost = static_cast<double>(i + 1) / n;
    level.relative_flops = static_cast<double>(i + 1) / n;
    level.quality = 1 - (n - 1 - i) / 20.0;
    level.weight_bytes = 1000 * (i + 1);
    level.flops_per_token = 2000.0 * (i + 1);
    model.levels.push_back(level);
  }
  model.tokenizer = tokenizer_.get();
  model.chat_template = nullptr;
  return model;
}

}  // namespace nestor
