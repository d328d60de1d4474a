#include "engine/tokenizer_pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <unicode/uchar.h>

#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "engine/unicode.h"

namespace nestor {
namespace {

// What Oniguruma means by \s and \w; PCRE2's own classes differ in a few characters (U+180E,
// marks).
constexpr char kSpaceClass[] =
    R"(\x{09}-\x{0d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
constexpr char kWordClass[] = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{b2}\x{b3}\x{b9}\x{bc}-\x{be})";

// Rewrites an expression from Oniguruma's syntax to PCRE2's, one element at a time.
class SyntaxTranslator {
 public:
  explicit SyntaxTranslator(std::string_view source) : source_(source) {}

  absl::StatusOr<std::string> Translate() {
    while (position_ < source_.size()) {
      if (source_[position_] == '\\') {
        NESTOR_RETURN_IF_ERROR(TranslateEscape());
      } else if (is_in_class_) {
        NESTOR_RETURN_IF_ERROR(TranslateInClass());
      } else {
        if (source_[position_] == '[')
          OpenClass();
        else
          out_ += source_[position_++];
      }
    }
    return std::move(out_);
  }

 private:
  absl::Status Unsupported(std::string_view construct) const {
    return absl::InvalidArgumentError(absl::StrCat(
        absl::string_view(construct.data(), construct.size()), " at byte ", position_, " of \"",
        absl::string_view(source_.data(), source_.size()), "\" is not supported"));
  }

  void OpenClass() {
    is_in_class_ = true;
    out_ += source_[position_++];
    if (Peek() == '^') out_ += source_[position_++];
    // A bracket that comes first is a member.
    if (Peek() == ']') out_ += source_[position_++];
  }

  absl::Status TranslateInClass() {
    const std::string_view rest = source_.substr(position_);
    if (rest.starts_with("[:")) {
      const size_t end = rest.find(":]");
      if (end == std::string_view::npos) return Unsupported("an open [:");
      out_ += rest.substr(0, end + 2);
      position_ += end + 2;
      return absl::OkStatus();
    }
    if (rest[0] == '[') return Unsupported("a class within a class");
    if (rest.starts_with("&&")) return Unsupported("an intersection of classes");
    if (rest[0] == ']') is_in_class_ = false;
    out_ += source_[position_++];
    return absl::OkStatus();
  }

  absl::Status TranslateEscape() {
    if (position_ + 1 == source_.size()) return Unsupported("a lone backslash");
    const char kind = source_[position_ + 1];
    switch (kind) {
      case 's':
      case 'w':
        AppendClass(kind == 's' ? kSpaceClass : kWordClass, "[");
        break;
      case 'S':
      case 'W':
        if (is_in_class_) return Unsupported("a negated class within a class");
        AppendClass(kind == 'S' ? kSpaceClass : kWordClass, "[^");
        break;
      case 'h':
      case 'H':
        return Unsupported("\\h");
      case 'p':
      case 'P':
        return TranslateProperty();
      case 'u': {
        const std::string_view digits = source_.substr(position_ + 2, 4);
        out_ += absl::StrCat("\\x{", absl::string_view(digits.data(), digits.size()), "}");
        position_ += 2 + digits.size();
        return absl::OkStatus();
      }
      default:
        out_ += source_.substr(position_, 2);
    }
    position_ += 2;
    return absl::OkStatus();
  }

  // By the name of a script PCRE2 means every character that the script uses (its extensions).
  absl::Status TranslateProperty() {
    const std::string_view rest = source_.substr(position_);
    const size_t end = rest.find('}');
    if (rest.size() < 3 || rest[2] != '{' || end == std::string_view::npos) {
      return Unsupported("\\p without braces");
    }
    std::string name(rest.substr(3, end - 3));
    const bool is_negated = name.starts_with('^');
    if (is_negated) name.erase(0, 1);
    const bool is_script = u_getPropertyValueEnum(UCHAR_SCRIPT, name.c_str()) != UCHAR_INVALID_CODE;
    out_ += rest.substr(0, 3);
    absl::StrAppend(&out_, is_negated ? "^" : "", is_script ? "sc:" : "", name, "}");
    position_ += end + 1;
    return absl::OkStatus();
  }

  void AppendClass(const char* members, const char* opening) {
    if (is_in_class_) {
      out_ += members;
    } else {
      out_ += absl::StrCat(opening, members, "]");
    }
  }

  char Peek() const { return position_ < source_.size() ? source_[position_] : '\0'; }

  const std::string_view source_;
  size_t position_ = 0;
  bool is_in_class_ = false;
  std::string out_;
};

std::string Pcre2Message(int error) {
  PCRE2_UCHAR8 buffer[256];
  pcre2_get_error_message_8(error, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

struct MatchDeleter {
  void operator()(pcre2_match_data_8* match) const { pcre2_match_data_free_8(match); }
};

// The first match at or after `start`, nullopt where there is none.
absl::StatusOr<std::optional<TextSpan>> FindFrom(const pcre2_code_8* code, std::string_view text,
                                                 size_t start, pcre2_match_data_8* match) {
  const auto* subject = reinterpret_cast<PCRE2_SPTR8>(text.data());
  int result = pcre2_match_8(code, subject, text.size(), start, PCRE2_NO_UTF_CHECK, match, nullptr);
  if (result == PCRE2_ERROR_JIT_STACKLIMIT) {
    // The interpreter keeps its stack on the heap.
    result = pcre2_match_8(code, subject, text.size(), start, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                           match, nullptr);
  }
  if (result == PCRE2_ERROR_NOMATCH) return std::nullopt;
  if (result < 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("matching a tokenizer's expression: ", Pcre2Message(result)));
  }
  const PCRE2_SIZE* span = pcre2_get_ovector_pointer_8(match);
  return TextSpan{.begin = span[0], .end = span[1]};
}

}  // namespace

void TextPattern::CodeDeleter::operator()(void* code) const {
  pcre2_code_free_8(static_cast<pcre2_code_8*>(code));
}

absl::StatusOr<TextPattern> TextPattern::Parse(const JsonField& field) {
  if (field.value().is_string()) {
    TextPattern pattern;
    NESTOR_ASSIGN_OR_RETURN(pattern.literal_, field.AsString());
    return pattern;
  }
  if (!field.Member("Regex").is_null()) {
    NESTOR_ASSIGN_OR_RETURN(const std::string expression, field.GetString("Regex"));
    absl::StatusOr<TextPattern> pattern = FromRegex(expression);
    if (!pattern.ok()) {
      return field.Member("Regex").Error(std::string(pattern.status().message()));
    }
    return pattern;
  }
  TextPattern pattern;
  NESTOR_ASSIGN_OR_RETURN(pattern.literal_, field.GetString("String"));
  return pattern;
}

absl::StatusOr<TextPattern> TextPattern::FromRegex(const std::string& expression) {
  NESTOR_ASSIGN_OR_RETURN(const std::string translated, SyntaxTranslator(expression).Translate());
  int error = 0;
  PCRE2_SIZE offset = 0;
  // Oniguruma's ^ and $ match at every line.
  pcre2_code_8* code =
      pcre2_compile_8(reinterpret_cast<PCRE2_SPTR8>(translated.data()), translated.size(),
                      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &offset, nullptr);
  if (code == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("\"", expression, "\": ", Pcre2Message(error)));
  }
  TextPattern pattern;
  pattern.code_.reset(code);
  // Without a compiler for this processor the interpreter runs.
  pcre2_jit_compile_8(code, PCRE2_JIT_COMPLETE);
  return pattern;
}

std::vector<TextSpan> TextPattern::FindAllLiteral(std::string_view text) const {
  std::vector<TextSpan> matches;
  if (literal_.empty()) return matches;
  size_t begin = text.find(literal_);
  while (begin != std::string_view::npos) {
    matches.push_back({.begin = begin, .end = begin + literal_.size()});
    begin = text.find(literal_, begin + literal_.size());
  }
  return matches;
}

absl::StatusOr<std::vector<TextSpan>> TextPattern::FindAll(std::string_view text) const {
  if (code_ == nullptr) return FindAllLiteral(text);
  const auto* code = static_cast<const pcre2_code_8*>(code_.get());
  const std::unique_ptr<pcre2_match_data_8, MatchDeleter> match(
      pcre2_match_data_create_from_pattern_8(code, nullptr));
  NESTOR_CHECK(match != nullptr);
  std::vector<TextSpan> matches;
  size_t start = 0;
  while (start <= text.size()) {
    NESTOR_ASSIGN_OR_RETURN(const std::optional<TextSpan> span,
                            FindFrom(code, text, start, match.get()));
    if (!span.has_value()) break;
    const bool is_empty = span->begin == span->end;
    if (is_empty && !matches.empty() && matches.back().end == span->end) {
      if (start == text.size()) break;
      NextCodePoint(text, &start);
      continue;
    }
    matches.push_back(*span);
    start = span->end;
  }
  return matches;
}

absl::StatusOr<std::string> TextPattern::ReplaceAll(std::string_view text,
                                                    std::string_view content) const {
  NESTOR_ASSIGN_OR_RETURN(const std::vector<TextSpan> matches, FindAll(text));
  std::string replaced;
  replaced.reserve(text.size());
  size_t copied = 0;
  for (const TextSpan& match : matches) {
    replaced += text.substr(copied, match.begin - copied);
    replaced += content;
    copied = match.end;
  }
  replaced += text.substr(copied);
  return replaced;
}

}  // namespace nestor
