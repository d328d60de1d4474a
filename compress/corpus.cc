#include "compress/corpus.h"

#include <algorithm>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/check.h"
#include "base/checksum.h"
#include "base/file.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

// Below this a second moment of a few hundred inputs is noise.
constexpr int64_t kLeastCalibrationTokens = 2048;
constexpr int64_t kLeastEvaluationTokens = 256;
constexpr double kHeldOutShare = 0.2;

struct TextParts {
  std::string calibration;
  std::string evaluation;
};

// The first four fifths and the rest, cut at a line's end.
TextParts HoldOut(const std::string& text) {
  const size_t target = static_cast<size_t>(static_cast<double>(text.size()) * (1 - kHeldOutShare));
  const size_t newline = text.find('\n', target);
  if (newline == std::string::npos) return {text, ""};
  return {text.substr(0, newline + 1), text.substr(newline + 1)};
}

// Every k-th sequence, so that about `tokens` are taken from all over the text.
TokenSequences Spread(TokenSequences sequences, int64_t tokens) {
  const int64_t total = CountTokens(sequences);
  if (total <= tokens) return sequences;
  TokenSequences taken;
  int64_t seen = 0;
  int64_t kept = 0;
  for (std::vector<int32_t>& sequence : sequences) {
    const int64_t size = static_cast<int64_t>(sequence.size());
    // Keeps kept / tokens level with seen / total.
    if (kept * total <= seen * tokens && kept < tokens) {
      kept += size;
      taken.push_back(std::move(sequence));
    }
    seen += size;
  }
  return taken;
}

// What the sequences are to be cut to, for `tokens` in all; the longest one's where that is too
// few.
int64_t LengthFor(const TokenSequences& sequences, int64_t tokens) {
  std::vector<int64_t> sizes;
  for (const std::vector<int32_t>& sequence : sequences) sizes.push_back(std::ssize(sequence));
  std::sort(sizes.begin(), sizes.end());
  int64_t left = tokens;
  for (int64_t i = 0; i < std::ssize(sizes); ++i) {
    const int64_t others = std::ssize(sizes) - i;
    const int64_t share = (left + others - 1) / others;
    const int64_t size = sizes[static_cast<size_t>(i)];
    if (size >= share) return share;
    left -= size;
  }
  return sizes.empty() ? 0 : sizes.back();
}

// About `tokens` in all, equal shares of each text as far as it reaches.
TokenSequences Mix(std::vector<TokenSequences> texts, int64_t tokens) {
  std::sort(texts.begin(), texts.end(), [](const TokenSequences& a, const TokenSequences& b) {
    return CountTokens(a) < CountTokens(b);
  });
  TokenSequences mixed;
  int64_t left = tokens;
  for (size_t i = 0; i < texts.size(); ++i) {
    TokenSequences share =
        Spread(std::move(texts[i]), left / static_cast<int64_t>(texts.size() - i));
    left -= CountTokens(share);
    std::move(share.begin(), share.end(), std::back_inserter(mixed));
  }
  return mixed;
}

absl::Status CheckLength(const std::string& what, const TokenSequences& sequences, int64_t needed) {
  const int64_t tokens = CountTokens(sequences);
  if (tokens >= needed) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(what, ": ", tokens, " tokens, at least ", needed, " are needed"));
}

std::string Sha256OfText(const std::string& text) { return Sha256(std::as_bytes(std::span(text))); }

}  // namespace

int64_t CountTokens(const TokenSequences& sequences) {
  int64_t tokens = 0;
  for (const std::vector<int32_t>& sequence : sequences) {
    tokens += static_cast<int64_t>(sequence.size());
  }
  return tokens;
}

absl::StatusOr<TokenSequences> SequencesOf(const std::string& text, const Tokenizer& tokenizer,
                                           const ModelSpec& spec, int64_t max_tokens) {
  TokenSequences sequences;
  if (spec.is_encoder()) {
    int64_t taken = 0;
    for (const auto& line : absl::StrSplit(text, '\n')) {
      if (max_tokens > 0 && taken >= max_tokens) break;
      const std::string stripped(absl::StripAsciiWhitespace(line));
      if (stripped.empty()) continue;
      NESTOR_ASSIGN_OR_RETURN(std::vector<int32_t> ids,
                              tokenizer.Encode(stripped, /*adds_special_tokens=*/true));
      ids.resize(
          std::min(ids.size(), static_cast<size_t>(std::min(spec.context_length, kWindowTokens))));
      taken += static_cast<int64_t>(ids.size());
      sequences.push_back(std::move(ids));
    }
    return sequences;
  }
  NESTOR_ASSIGN_OR_RETURN(const std::vector<int32_t> ids,
                          tokenizer.Encode(text, /*adds_special_tokens=*/false));
  const size_t window = static_cast<size_t>(std::min(kWindowTokens, spec.context_length));
  const size_t end =
      max_tokens > 0 ? std::min(ids.size(), static_cast<size_t>(max_tokens)) : ids.size();
  for (size_t begin = 0; begin + 1 < end; begin += window) {
    sequences.emplace_back(ids.begin() + static_cast<ptrdiff_t>(begin),
                           ids.begin() + static_cast<ptrdiff_t>(std::min(begin + window, end)));
  }
  return sequences;
}

TokenSequences SpreadOver(TokenSequences sequences, int64_t tokens, int64_t longest) {
  longest = std::max(longest, LengthFor(sequences, tokens));
  for (std::vector<int32_t>& sequence : sequences) {
    sequence.resize(std::min(sequence.size(), static_cast<size_t>(longest)));
  }
  return Spread(std::move(sequences), tokens);
}

absl::StatusOr<Corpus> ReadCorpus(const CorpusOptions& options, const Tokenizer& tokenizer,
                                  const ModelSpec& spec) {
  const bool holds_out = options.evaluation_path.empty();
  NESTOR_CHECK(!holds_out || !options.calibration_paths.empty());
  std::vector<TokenSequences> calibration;
  std::vector<TokenSequences> evaluation;
  std::string calibration_text;
  std::string evaluation_text;
  for (const std::string& path : options.calibration_paths) {
    NESTOR_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
    const TextParts parts = holds_out ? HoldOut(text) : TextParts{text, ""};
    calibration_text += parts.calibration;
    evaluation_text += parts.evaluation;
    NESTOR_ASSIGN_OR_RETURN(calibration.emplace_back(),
                            SequencesOf(parts.calibration, tokenizer, spec, 0));
    NESTOR_ASSIGN_OR_RETURN(evaluation.emplace_back(),
                            SequencesOf(parts.evaluation, tokenizer, spec, 0));
  }
  if (!holds_out) {
    NESTOR_ASSIGN_OR_RETURN(evaluation_text, ReadFile(options.evaluation_path));
    evaluation.clear();
    NESTOR_ASSIGN_OR_RETURN(evaluation.emplace_back(),
                            SequencesOf(evaluation_text, tokenizer, spec, 0));
  }
  const std::string paths = absl::StrJoin(options.calibration_paths, ", ");
  Corpus corpus;
  corpus.calibration = Mix(std::move(calibration), options.calibration_tokens);
  corpus.evaluation = Mix(std::move(evaluation), options.evaluation_tokens);
  if (!options.calibration_paths.empty()) {
    NESTOR_RETURN_IF_ERROR(CheckLength(
        absl::StrCat(paths, holds_out ? " (without its last fifth, which is held out)" : "",
                     ": calibration text"),
        corpus.calibration, std::min(kLeastCalibrationTokens, options.calibration_tokens)));
  }
  NESTOR_RETURN_IF_ERROR(
      CheckLength(holds_out ? absl::StrCat(paths, ": its last fifth, held out for evaluation")
                            : absl::StrCat(options.evaluation_path, ": evaluation text"),
                  corpus.evaluation, std::min(kLeastEvaluationTokens, options.evaluation_tokens)));
  corpus.calibration_sha256 = Sha256OfText(calibration_text);
  corpus.evaluation_sha256 = Sha256OfText(evaluation_text);
  return corpus;
}

}  // namespace nestor
