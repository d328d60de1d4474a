#include "engine/pre_tokenizer.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/pre_tokenizer_bytes.h"
#include "engine/tokenizer_pattern.h"
#include "engine/unicode.h"

namespace nestor {
namespace {

enum class SplitBehavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

// A part of a text that is a delimiter or lies between delimiters.
struct Section {
  TextSpan span;
  bool is_delimiter;
};

// `delimiters` and what lies between them, without gaps; `inverts` swaps their parts.
std::vector<Section> SectionsOf(const std::vector<TextSpan>& delimiters, size_t size,
                                bool inverts) {
  std::vector<Section> sections;
  sections.reserve(2 * delimiters.size() + 1);
  size_t end = 0;
  for (const TextSpan& delimiter : delimiters) {
    if (end != delimiter.begin) sections.push_back({{end, delimiter.begin}, inverts});
    sections.push_back({delimiter, !inverts});
    end = delimiter.end;
  }
  if (end != size) sections.push_back({{end, size}, inverts});
  return sections;
}

// Joins every section for which `joins(is_delimiter, previous_is_delimiter)` to the one before it.
std::vector<TextSpan> Joined(const std::vector<Section>& sections,
                             absl::FunctionRef<bool(bool, bool)> joins) {
  std::vector<TextSpan> spans;
  bool previous_is_delimiter = false;
  for (const Section& section : sections) {
    if (!spans.empty() && joins(section.is_delimiter, previous_is_delimiter)) {
      spans.back().end = section.span.end;
    } else {
      spans.push_back(section.span);
    }
    previous_is_delimiter = section.is_delimiter;
  }
  return spans;
}

// Joins every delimiter to the section that follows, as if read from the right.
std::vector<TextSpan> JoinedWithNext(const std::vector<Section>& sections) {
  std::vector<TextSpan> spans;
  bool next_is_delimiter = false;
  for (auto section = sections.rbegin(); section != sections.rend(); ++section) {
    if (!spans.empty() && section->is_delimiter && !next_is_delimiter) {
      spans.back().begin = section->span.begin;
    } else {
      spans.push_back(section->span);
    }
    next_is_delimiter = section->is_delimiter;
  }
  std::reverse(spans.begin(), spans.end());
  return spans;
}

std::vector<TextSpan> SpansAfterSplit(const std::vector<Section>& sections,
                                      SplitBehavior behavior) {
  switch (behavior) {
    case SplitBehavior::kRemoved: {
      std::vector<TextSpan> spans;
      for (const Section& section : sections) {
        if (!section.is_delimiter) spans.push_back(section.span);
      }
      return spans;
    }
    case SplitBehavior::kIsolated:
      return Joined(sections, [](bool, bool) { return false; });
    case SplitBehavior::kContiguous:
      return Joined(sections, [](bool is, bool previous_is) { return is == previous_is; });
    case SplitBehavior::kMergedWithPrevious:
      return Joined(sections, [](bool is, bool previous_is) { return is && !previous_is; });
    case SplitBehavior::kMergedWithNext:
      return JoinedWithNext(sections);
  }
  return {};
}

using FindDelimiters = absl::FunctionRef<absl::StatusOr<std::vector<TextSpan>>(std::string_view)>;

absl::Status SplitPieces(FindDelimiters find, SplitBehavior behavior, bool inverts,
                         std::vector<TextPiece>* pieces) {
  std::vector<TextPiece> finer;
  finer.reserve(pieces->size());
  for (TextPiece& piece : *pieces) {
    NESTOR_ASSIGN_OR_RETURN(const std::vector<TextSpan> delimiters, find(piece.text));
    const std::vector<Section> sections = SectionsOf(delimiters, piece.text.size(), inverts);
    for (const TextSpan& span : SpansAfterSplit(sections, behavior)) {
      if (span.begin == span.end) continue;
      finer.push_back({.text = piece.text.substr(span.begin, span.end - span.begin),
                       .starts_input = piece.starts_input && span.begin == 0});
    }
  }
  *pieces = std::move(finer);
  return absl::OkStatus();
}

// Every character that `is_delimiter` is a delimiter of its own.
absl::Status SplitAtCharacters(absl::FunctionRef<bool(char32_t)> is_delimiter,
                               SplitBehavior behavior, std::vector<TextPiece>* pieces) {
  const auto find = [&](std::string_view text) -> absl::StatusOr<std::vector<TextSpan>> {
    std::vector<TextSpan> delimiters;
    for (size_t i = 0; i < text.size();) {
      const size_t begin = i;
      if (is_delimiter(NextCodePoint(text, &i))) delimiters.push_back({begin, i});
    }
    return delimiters;
  };
  return SplitPieces(find, behavior, false, pieces);
}

class SequencePreTokenizer : public PreTokenizer {
 public:
  explicit SequencePreTokenizer(std::vector<std::unique_ptr<PreTokenizer>> parts)
      : parts_(std::move(parts)) {}
  absl::Status Split(std::vector<TextPiece>* pieces) const override {
    for (const auto& part : parts_) NESTOR_RETURN_IF_ERROR(part->Split(pieces));
    return absl::OkStatus();
  }

 private:
  const std::vector<std::unique_ptr<PreTokenizer>> parts_;
};

class SplitPreTokenizer : public PreTokenizer {
 public:
  SplitPreTokenizer(TextPattern pattern, SplitBehavior behavior, bool inverts)
      : pattern_(std::move(pattern)), behavior_(behavior), inverts_(inverts) {}
  absl::Status Split(std::vector<TextPiece>* pieces) const override {
    return SplitPieces([this](std::string_view text) { return pattern_.FindAll(text); }, behavior_,
                       inverts_, pieces);
  }

 private:
  const TextPattern pattern_;
  const SplitBehavior behavior_;
  const bool inverts_;
};

// Splits at characters of a class.
class CharacterPreTokenizer : public PreTokenizer {
 public:
  CharacterPreTokenizer(bool (*is_delimiter)(char32_t), SplitBehavior behavior)
      : is_delimiter_(is_delimiter), behavior_(behavior) {}
  absl::Status Split(std::vector<TextPiece>* pieces) const override {
    return SplitAtCharacters(is_delimiter_, behavior_, pieces);
  }

 private:
  bool (*const is_delimiter_)(char32_t);
  const SplitBehavior behavior_;
};

class BertPreTokenizer : public PreTokenizer {
 public:
  absl::Status Split(std::vector<TextPiece>* pieces) const override {
    NESTOR_RETURN_IF_ERROR(SplitAtCharacters(IsWhitespace, SplitBehavior::kRemoved, pieces));
    return SplitAtCharacters(IsPunctuation, SplitBehavior::kIsolated, pieces);
  }
};

// \w+|[^\w\s]+ : words, and runs of what is neither word nor space.
class WhitespacePreTokenizer : public PreTokenizer {
 public:
  absl::Status Split(std::vector<TextPiece>* pieces) const override {
    const auto find = [](std::string_view text) -> absl::StatusOr<std::vector<TextSpan>> {
      std::vector<TextSpan> runs;
      int previous_class = kSpace;
      for (size_t i = 0; i < text.size();) {
        const size_t begin = i;
        const int current_class = ClassOf(NextCodePoint(text, &i));
        if (current_class != kSpace) {
          if (current_class == previous_class)
            runs.back().end = i;
          else
            runs.push_back({begin, i});
        }
        previous_class = current_class;
      }
      return runs;
    };
    return SplitPieces(find, SplitBehavior::kRemoved, true, pieces);
  }

 private:
  enum Class { kSpace, kWord, kOther };
  static Class ClassOf(char32_t c) {
    if (IsWordCharacter(c)) return kWord;
    return IsWhitespace(c) ? kSpace : kOther;
  }
};

// GPT-2's split and byte alphabet.
class ByteLevelPreTokenizer : public PreTokenizer {
 public:
  // Without a pattern the pieces stay whole.
  ByteLevelPreTokenizer(bool adds_prefix_space, std::unique_ptr<TextPattern> pattern)
      : adds_prefix_space_(adds_prefix_space), pattern_(std::move(pattern)) {}

  absl::Status Split(std::vector<TextPiece>* pieces) const override {
    if (adds_prefix_space_) {
      for (TextPiece& piece : *pieces) {
        if (!piece.text.starts_with(' ')) piece.text.insert(0, 1, ' ');
      }
    }
    if (pattern_ != nullptr) {
      NESTOR_RETURN_IF_ERROR(
          SplitPieces([this](std::string_view text) { return pattern_->FindAll(text); },
                      SplitBehavior::kIsolated, false, pieces));
    }
    for (TextPiece& piece : *pieces) piece.text = ByteLevelText(piece.text);
    return absl::OkStatus();
  }

 private:
  const bool adds_prefix_space_;
  const std::unique_ptr<const TextPattern> pattern_;
};

// Sentencepiece's visible spaces.
class MetaspacePreTokenizer : public PreTokenizer {
 public:
  enum class PrependScheme { kAlways, kFirst, kNever };
  MetaspacePreTokenizer(std::string replacement, PrependScheme scheme, bool splits)
      : replacement_(std::move(replacement)), scheme_(scheme), splits_(splits) {}

  absl::Status Split(std::vector<TextPiece>* pieces) const override {
    for (TextPiece& piece : *pieces) MarkSpaces(&piece);
    if (!splits_) return absl::OkStatus();
    size_t position = 0;
    const char32_t mark = NextCodePoint(replacement_, &position);
    return SplitAtCharacters([mark](char32_t c) { return c == mark; },
                             SplitBehavior::kMergedWithNext, pieces);
  }

 private:
  void MarkSpaces(TextPiece* piece) const {
    std::string marked;
    marked.reserve(piece->text.size() + replacement_.size());
    for (const char c : piece->text) {
      if (c == ' ')
        marked += replacement_;
      else
        marked += c;
    }
    const bool prepends = scheme_ == PrependScheme::kAlways ||
                          (scheme_ == PrependScheme::kFirst && piece->starts_input);
    if (prepends && !marked.starts_with(replacement_)) marked.insert(0, replacement_);
    piece->text = std::move(marked);
  }

  const std::string replacement_;  // one character
  const PrependScheme scheme_;
  const bool splits_;
};

// GPT-2's expression, which the type ByteLevel implies.
constexpr char kGpt2Pattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

absl::StatusOr<SplitBehavior> ParseBehavior(const JsonField& field, const std::string& otherwise) {
  NESTOR_ASSIGN_OR_RETURN(const std::string name, field.GetString("behavior", otherwise));
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  return field.Member("behavior").Error(absl::StrCat("\"", name, "\" is not supported"));
}

absl::StatusOr<std::unique_ptr<PreTokenizer>> ParseSequence(const JsonField& field) {
  NESTOR_ASSIGN_OR_RETURN(const std::vector<JsonField> entries,
                          field.Member("pretokenizers").Entries());
  std::vector<std::unique_ptr<PreTokenizer>> parts;
  for (const JsonField& entry : entries) {
    NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<PreTokenizer> part, ParsePreTokenizer(entry));
    if (part != nullptr) parts.push_back(std::move(part));
  }
  return std::make_unique<SequencePreTokenizer>(std::move(parts));
}

absl::StatusOr<std::unique_ptr<PreTokenizer>> ParseSplit(const JsonField& field) {
  NESTOR_ASSIGN_OR_RETURN(TextPattern pattern, TextPattern::Parse(field.Member("pattern")));
  NESTOR_ASSIGN_OR_RETURN(const SplitBehavior behavior, ParseBehavior(field, ""));
  NESTOR_ASSIGN_OR_RETURN(const bool inverts, field.GetBool("invert", false));
  return std::make_unique<SplitPreTokenizer>(std::move(pattern), behavior, inverts);
}

absl::StatusOr<std::unique_ptr<PreTokenizer>> ParseByteLevel(const JsonField& field) {
  NESTOR_ASSIGN_OR_RETURN(const bool adds_prefix_space, field.GetBool("add_prefix_space", true));
  NESTOR_ASSIGN_OR_RETURN(const bool uses_pattern, field.GetBool("use_regex", true));
  std::unique_ptr<TextPattern> pattern;
  if (uses_pattern) {
    NESTOR_ASSIGN_OR_RETURN(TextPattern gpt2, TextPattern::FromRegex(kGpt2Pattern));
    pattern = std::make_unique<TextPattern>(std::move(gpt2));
  }
  return std::make_unique<ByteLevelPreTokenizer>(adds_prefix_space, std::move(pattern));
}

absl::StatusOr<std::unique_ptr<PreTokenizer>> ParseMetaspace(const JsonField& field) {
  NESTOR_ASSIGN_OR_RETURN(std::string replacement, field.GetString("replacement", "▁"));
  if (CountCodePoints(replacement) != 1) {
    return field.Member("replacement")
        .Error(absl::StrCat("must be one character; was \"", replacement, "\""));
  }
  // Files older than `prepend_scheme` have `add_prefix_space`.
  NESTOR_ASSIGN_OR_RETURN(const bool adds_prefix_space, field.GetBool("add_prefix_space", true));
  NESTOR_ASSIGN_OR_RETURN(
      const std::string scheme,
      field.GetString("prepend_scheme", adds_prefix_space ? "always" : "never"));
  NESTOR_ASSIGN_OR_RETURN(const bool splits, field.GetBool("split", true));
  using Scheme = MetaspacePreTokenizer::PrependScheme;
  if (scheme != "always" && scheme != "first" && scheme != "never") {
    return field.Member("prepend_scheme").Error(absl::StrCat("\"", scheme, "\" is not supported"));
  }
  const Scheme parsed = scheme == "always"  ? Scheme::kAlways
                        : scheme == "first" ? Scheme::kFirst
                                            : Scheme::kNever;
  return std::make_unique<MetaspacePreTokenizer>(std::move(replacement), parsed, splits);
}

}  // namespace

absl::StatusOr<std::unique_ptr<PreTokenizer>> ParsePreTokenizer(const JsonField& field) {
  if (field.is_null()) return nullptr;
  NESTOR_ASSIGN_OR_RETURN(const std::string type, field.GetString("type"));
  if (type == "Sequence") return ParseSequence(field);
  if (type == "ByteLevel") return ParseByteLevel(field);
  if (type == "Split") return ParseSplit(field);
  if (type == "Metaspace") return ParseMetaspace(field);
  if (type == "BertPreTokenizer") return std::make_unique<BertPreTokenizer>();
  if (type == "Whitespace") return std::make_unique<WhitespacePreTokenizer>();
  if (type == "WhitespaceSplit") {
    return std::make_unique<CharacterPreTokenizer>(IsWhitespace, SplitBehavior::kRemoved);
  }
  if (type == "Digits") {
    NESTOR_ASSIGN_OR_RETURN(const bool is_individual, field.GetBool("individual_digits", false));
    return std::make_unique<CharacterPreTokenizer>(
        IsNumeric, is_individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous);
  }
  if (type == "Punctuation") {
    NESTOR_ASSIGN_OR_RETURN(const SplitBehavior behavior, ParseBehavior(field, "Isolated"));
    return std::make_unique<CharacterPreTokenizer>(IsPunctuation, behavior);
  }
  return field.Member("type").Error(absl::StrCat("pre-tokenizer \"", type, "\" is not supported"));
}

}  // namespace nestor
