#include "engine/normalizer.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/pre_tokenizer_bytes.h"
#include "engine/tokenizer_pattern.h"
#include "engine/unicode.h"

namespace nestor {
namespace {

std::string WithoutCharacters(const std::string& text, bool (*is_left_out)(char32_t)) {
  std::string kept;
  kept.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    if (!is_left_out(NextCodePoint(text, &i))) kept.append(text, begin, i - begin);
  }
  return kept;
}

class SequenceNormalizer : public TextNormalizer {
 public:
  explicit SequenceNormalizer(std::vector<std::unique_ptr<TextNormalizer>> parts)
      : parts_(std::move(parts)) {}
  absl::Status Normalize(std::string* text) const override {
    for (const auto& part : parts_) NESTOR_RETURN_IF_ERROR(part->Normalize(text));
    return absl::OkStatus();
  }

 private:
  const std::vector<std::unique_ptr<TextNormalizer>> parts_;
};

class UnicodeFormNormalizer : public TextNormalizer {
 public:
  explicit UnicodeFormNormalizer(NormalizationForm form) : form_(form) {}
  absl::Status Normalize(std::string* text) const override {
    *text = NormalizeUnicode(form_, *text);
    return absl::OkStatus();
  }

 private:
  const NormalizationForm form_;
};

class LowercaseNormalizer : public TextNormalizer {
 public:
  absl::Status Normalize(std::string* text) const override {
    *text = LowercaseCharacters(*text);
    return absl::OkStatus();
  }
};

class StripAccentsNormalizer : public TextNormalizer {
 public:
  absl::Status Normalize(std::string* text) const override {
    *text = WithoutCharacters(*text, IsMark);
    return absl::OkStatus();
  }
};

class ByteLevelNormalizer : public TextNormalizer {
 public:
  absl::Status Normalize(std::string* text) const override {
    *text = ByteLevelText(*text);
    return absl::OkStatus();
  }
};

// The text clean-up of BERT's original tokeniser.
class BertNormalizer : public TextNormalizer {
 public:
  struct Options {
    bool cleans_text;
    bool isolates_chinese_characters;
    bool strips_accents;
    bool lowercases;
  };
  explicit BertNormalizer(const Options& options) : options_(options) {}

  absl::Status Normalize(std::string* text) const override {
    if (options_.cleans_text) *text = Cleaned(*text);
    if (options_.isolates_chinese_characters) *text = WithChineseIsolated(*text);
    if (options_.strips_accents) {
      *text = WithoutCharacters(NormalizeUnicode(NormalizationForm::kNfd, *text), IsNonspacingMark);
    }
    if (options_.lowercases) *text = LowercaseCharacters(*text);
    return absl::OkStatus();
  }

 private:
  static std::string Cleaned(const std::string& text) {
    std::string cleaned;
    cleaned.reserve(text.size());
    for (size_t i = 0; i < text.size();) {
      const char32_t c = NextCodePoint(text, &i);
      if (c == '\t' || c == '\n' || c == '\r') {
        cleaned += ' ';
      } else if (c == 0xfffd || IsControl(c)) {
        continue;
      } else {
        AppendUtf8(IsWhitespace(c) ? U' ' : c, &cleaned);
      }
    }
    return cleaned;
  }

  static std::string WithChineseIsolated(const std::string& text) {
    std::string isolated;
    isolated.reserve(text.size());
    for (size_t i = 0; i < text.size();) {
      const char32_t c = NextCodePoint(text, &i);
      const bool is_isolated = IsChineseCharacter(c);
      if (is_isolated) isolated += ' ';
      AppendUtf8(c, &isolated);
      if (is_isolated) isolated += ' ';
    }
    return isolated;
  }

  // The CJK ideograph blocks of BERT's tokenization.py, with Hugging Face's start of extension E.
  static bool IsChineseCharacter(char32_t c) {
    return (c >= 0x4e00 && c <= 0x9fff) || (c >= 0x3400 && c <= 0x4dbf) ||
           (c >= 0x20000 && c <= 0x2a6df) || (c >= 0x2a700 && c <= 0x2b73f) ||
           (c >= 0x2b740 && c <= 0x2b81f) || (c >= 0x2b920 && c <= 0x2ceaf) ||
           (c >= 0xf900 && c <= 0xfaff) || (c >= 0x2f800 && c <= 0x2fa1f);
  }

  const Options options_;
};

class PrependNormalizer : public TextNormalizer {
 public:
  explicit PrependNormalizer(std::string prefix) : prefix_(std::move(prefix)) {}
  absl::Status Normalize(std::string* text) const override {
    if (!text->empty()) text->insert(0, prefix_);
    return absl::OkStatus();
  }

 private:
  const std::string prefix_;
};

class ReplaceNormalizer : public TextNormalizer {
 public:
  ReplaceNormalizer(TextPattern pattern, std::string content)
      : pattern_(std::move(pattern)), content_(std::move(content)) {}
  absl::Status Normalize(std::string* text) const override {
    NESTOR_ASSIGN_OR_RETURN(*text, pattern_.ReplaceAll(*text, content_));
    return absl::OkStatus();
  }

 private:
  const TextPattern pattern_;
  const std::string content_;
};

class StripNormalizer : public TextNormalizer {
 public:
  StripNormalizer(bool strips_left, bool strips_right)
      : strips_left_(strips_left), strips_right_(strips_right) {}
  absl::Status Normalize(std::string* text) const override {
    size_t first = text->size();  // start of the first character that stays
    size_t last = 0;              // end of the last one
    for (size_t i = 0; i < text->size();) {
      const size_t begin = i;
      if (IsWhitespace(NextCodePoint(*text, &i))) continue;
      first = std::min(first, begin);
      last = i;
    }
    const size_t begin = strips_left_ ? first : 0;
    const size_t end = strips_right_ ? last : text->size();
    *text = begin < end ? text->substr(begin, end - begin) : std::string();
    return absl::OkStatus();
  }

 private:
  const bool strips_left_;
  const bool strips_right_;
};

absl::StatusOr<std::unique_ptr<TextNormalizer>> ParseSequence(const JsonField& field) {
  NESTOR_ASSIGN_OR_RETURN(const std::vector<JsonField> entries,
                          field.Member("normalizers").Entries());
  std::vector<std::unique_ptr<TextNormalizer>> parts;
  for (const JsonField& entry : entries) {
    NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<TextNormalizer> part, ParseNormalizer(entry));
    if (part != nullptr) parts.push_back(std::move(part));
  }
  return std::make_unique<SequenceNormalizer>(std::move(parts));
}

absl::StatusOr<std::unique_ptr<TextNormalizer>> ParseBert(const JsonField& field) {
  BertNormalizer::Options options;
  NESTOR_ASSIGN_OR_RETURN(options.cleans_text, field.GetBool("clean_text", true));
  NESTOR_ASSIGN_OR_RETURN(options.isolates_chinese_characters,
                          field.GetBool("handle_chinese_chars", true));
  NESTOR_ASSIGN_OR_RETURN(options.lowercases, field.GetBool("lowercase", true));
  NESTOR_ASSIGN_OR_RETURN(options.strips_accents,
                          field.GetBool("strip_accents", options.lowercases));
  return std::make_unique<BertNormalizer>(options);
}

}  // namespace

absl::StatusOr<std::unique_ptr<TextNormalizer>> ParseNormalizer(const JsonField& field) {
  if (field.is_null()) return nullptr;
  NESTOR_ASSIGN_OR_RETURN(const std::string type, field.GetString("type"));
  if (type == "Sequence") return ParseSequence(field);
  if (type == "NFC") return std::make_unique<UnicodeFormNormalizer>(NormalizationForm::kNfc);
  if (type == "NFD") return std::make_unique<UnicodeFormNormalizer>(NormalizationForm::kNfd);
  if (type == "NFKC") return std::make_unique<UnicodeFormNormalizer>(NormalizationForm::kNfkc);
  if (type == "NFKD") return std::make_unique<UnicodeFormNormalizer>(NormalizationForm::kNfkd);
  if (type == "Lowercase") return std::make_unique<LowercaseNormalizer>();
  if (type == "StripAccents") return std::make_unique<StripAccentsNormalizer>();
  if (type == "ByteLevel") return std::make_unique<ByteLevelNormalizer>();
  if (type == "BertNormalizer") return ParseBert(field);
  if (type == "Prepend") {
    NESTOR_ASSIGN_OR_RETURN(std::string prefix, field.GetString("prepend"));
    return std::make_unique<PrependNormalizer>(std::move(prefix));
  }
  if (type == "Replace") {
    NESTOR_ASSIGN_OR_RETURN(TextPattern pattern, TextPattern::Parse(field.Member("pattern")));
    NESTOR_ASSIGN_OR_RETURN(std::string content, field.GetString("content"));
    return std::make_unique<ReplaceNormalizer>(std::move(pattern), std::move(content));
  }
  if (type == "Strip") {
    NESTOR_ASSIGN_OR_RETURN(const bool strips_left, field.GetBool("strip_left", true));
    NESTOR_ASSIGN_OR_RETURN(const bool strips_right, field.GetBool("strip_right", true));
    return std::make_unique<StripNormalizer>(strips_left, strips_right);
  }
  return field.Member("type").Error(absl::StrCat("normalizer \"", type, "\" is not supported"));
}

}  // namespace nestor
