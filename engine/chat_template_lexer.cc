#include "engine/chat_template_lexer.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/unicode.h"

namespace nestor::chat_template {
namespace {

// Line ends become "\n", and one at the very end goes.
std::string NormalizedSource(const std::string& source) {
  std::string normalized;
  normalized.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] != '\r') {
      normalized += source[i];
    } else if (i + 1 == source.size() || source[i + 1] != '\n') {
      normalized += '\n';
    }
  }
  if (normalized.ends_with('\n')) normalized.pop_back();
  return normalized;
}

bool IsNameCharacter(char c) { return absl::ascii_isalnum(c) || c == '_'; }

class Lexer {
 public:
  explicit Lexer(const std::string& source) : source_(source) {}

  absl::StatusOr<std::vector<Token>> Run() {
    while (position_ < source_.size()) {
      const size_t begin = FindTag();
      AppendText(begin);
      if (begin == std::string::npos) break;
      Advance(begin + 2);
      const char kind = source_[begin + 1];
      if (Peek() == '-' || Peek() == '+') Advance(position_ + 1);
      if (kind == '#') {
        NESTOR_RETURN_IF_ERROR(SkipComment());
      } else {
        NESTOR_RETURN_IF_ERROR(TokenizeTag(kind == '{'));
      }
    }
    Append(Token::Kind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  absl::Status Error(const std::string& message) const {
    return absl::InvalidArgumentError(absl::StrCat("chat template line ", line_, ": ", message));
  }

  char Peek(size_t offset = 0) const {
    return position_ + offset < source_.size() ? source_[position_ + offset] : '\0';
  }

  void Append(Token::Kind kind, std::string text) {
    tokens_.push_back({.kind = kind, .text = std::move(text), .line = line_});
  }

  void Advance(size_t end) {
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<ptrdiff_t>(position_),
                                         source_.begin() + static_cast<ptrdiff_t>(end), '\n'));
    position_ = end;
  }

  size_t FindTag() const {
    size_t begin = source_.find('{', position_);
    while (begin != std::string::npos) {
      const char next = begin + 1 < source_.size() ? source_[begin + 1] : '\0';
      if (next == '{' || next == '%' || next == '#') return begin;
      begin = source_.find('{', begin + 1);
    }
    return begin;
  }

  // The text up to the tag at `begin`, or to the end of the source.
  void AppendText(size_t begin) {
    const size_t end = std::min(begin, source_.size());
    std::string_view text = std::string_view(source_).substr(position_, end - position_);
    if (begin != std::string::npos) {
      const char sign = begin + 2 < source_.size() ? source_[begin + 2] : '\0';
      if (sign == '-') {
        while (!text.empty() && absl::ascii_isspace(text.back())) text.remove_suffix(1);
      } else if (sign != '+' && source_[begin + 1] != '{') {
        text = WithoutIndentation(text);
      }
    }
    if (!text.empty()) Append(Token::Kind::kText, std::string(text));
    Advance(end);
  }

  // lstrip_blocks: white space goes where it is all that stands before the tag in its line.
  std::string_view WithoutIndentation(std::string_view text) const {
    const size_t line_break = text.rfind('\n');
    if (line_break == std::string_view::npos && !is_at_line_start_) return text;
    const size_t begin = line_break == std::string_view::npos ? 0 : line_break + 1;
    const std::string_view indentation = text.substr(begin);
    const bool is_blank = std::all_of(indentation.begin(), indentation.end(),
                                      [](char c) { return absl::ascii_isspace(c); });
    return is_blank ? text.substr(0, begin) : text;
  }

  // Behind a tag's end: "-" takes all white space, trim_blocks one line break after {% %} and {#
  // #}.
  void FinishTag(bool strips, bool trims_line_break) {
    size_t end = position_;
    if (strips) {
      while (end < source_.size() && absl::ascii_isspace(source_[end])) ++end;
    } else if (trims_line_break && Peek() == '\n') {
      ++end;
    }
    is_at_line_start_ = end > position_ && source_[end - 1] == '\n';
    Advance(end);
  }

  absl::Status SkipComment() {
    const size_t end = source_.find("#}", position_);
    if (end == std::string::npos) return Error("the comment is not closed");
    const char sign = end > position_ ? source_[end - 1] : '\0';
    Advance(end + 2);
    FinishTag(sign == '-', sign != '+');
    return absl::OkStatus();
  }

  absl::Status TokenizeTag(bool is_output) {
    Append(is_output ? Token::Kind::kOutputBegin : Token::Kind::kTagBegin, "");
    int num_open_brackets = 0;
    while (true) {
      while (position_ < source_.size() && absl::ascii_isspace(Peek())) Advance(position_ + 1);
      if (position_ == source_.size()) return Error("the tag is not closed");
      if (num_open_brackets == 0 && EndTag(is_output)) return absl::OkStatus();
      NESTOR_RETURN_IF_ERROR(TokenizeElement());
      const std::string& text = tokens_.back().text;
      if (tokens_.back().kind != Token::Kind::kOperator) continue;
      if (text == "(" || text == "[" || text == "{") ++num_open_brackets;
      if (text == ")" || text == "]" || text == "}") --num_open_brackets;
      if (num_open_brackets < 0) return Error(absl::StrCat("unexpected '", text, "'"));
    }
  }

  // Consumes the tag's end if it stands here.
  bool EndTag(bool is_output) {
    const std::string_view mark = is_output ? "}}" : "%}";
    const std::string_view rest = std::string_view(source_).substr(position_);
    const bool has_sign = rest[0] == '-' || (rest[0] == '+' && !is_output);
    if (!rest.substr(has_sign ? 1 : 0).starts_with(mark)) return false;
    Append(is_output ? Token::Kind::kOutputEnd : Token::Kind::kTagEnd, "");
    Advance(position_ + mark.size() + (has_sign ? 1 : 0));
    FinishTag(rest[0] == '-', !is_output && rest[0] != '+');
    return true;
  }

  absl::Status TokenizeElement() {
    const char c = Peek();
    if (absl::ascii_isdigit(c)) return TokenizeInteger();
    if (IsNameCharacter(c)) {
      size_t end = position_;
      while (end < source_.size() && IsNameCharacter(source_[end])) ++end;
      Append(Token::Kind::kName, source_.substr(position_, end - position_));
      Advance(end);
      return absl::OkStatus();
    }
    if (c == '\'' || c == '"') return TokenizeString();
    for (const char* op : {"==", "!=", "<=", ">=", "//", "**"}) {
      if (c == op[0] && Peek(1) == op[1]) return TokenizeOperator(2);
    }
    if (std::string_view("+-*/%~<>=.,:|()[]{}").find(c) != std::string_view::npos) {
      return TokenizeOperator(1);
    }
    return Error(absl::StrCat("unexpected '", std::string(1, c), "'"));
  }

  absl::Status TokenizeOperator(size_t size) {
    Append(Token::Kind::kOperator, source_.substr(position_, size));
    Advance(position_ + size);
    return absl::OkStatus();
  }

  absl::Status TokenizeInteger() {
    size_t end = position_;
    while (end < source_.size() && absl::ascii_isdigit(source_[end])) ++end;
    if (end + 1 < source_.size() && source_[end] == '.' && absl::ascii_isdigit(source_[end + 1])) {
      return Error("floating-point numbers are not supported");
    }
    Append(Token::Kind::kInteger, source_.substr(position_, end - position_));
    Advance(end);
    return absl::OkStatus();
  }

  absl::Status TokenizeString() {
    const char quote = Peek();
    std::string value;
    size_t i = position_ + 1;
    while (i < source_.size() && source_[i] != quote) {
      if (source_[i] != '\\') {
        value += source_[i++];
        continue;
      }
      NESTOR_ASSIGN_OR_RETURN(i, AppendEscape(i, &value));
    }
    if (i >= source_.size()) return Error("the string is not closed");
    Append(Token::Kind::kString, std::move(value));
    Advance(i + 1);
    return absl::OkStatus();
  }

  // Appends what the escape at `begin` stands for; returns its end.
  absl::StatusOr<size_t> AppendEscape(size_t begin, std::string* value) const {
    if (begin + 1 == source_.size()) return Error("the string is not closed");
    const char kind = source_[begin + 1];
    constexpr std::pair<char, char> kSimple[] = {
        {'n', '\n'}, {'t', '\t'}, {'r', '\r'}, {'\\', '\\'}, {'\'', '\''}, {'"', '"'},
        {'b', '\b'}, {'f', '\f'}, {'v', '\v'}, {'a', '\a'},  {'0', '\0'}};
    for (const auto& [letter, character] : kSimple) {
      if (kind != letter) continue;
      *value += character;
      return begin + 2;
    }
    if (kind == '\n') return begin + 2;
    const size_t num_digits = kind == 'x' ? 2 : kind == 'u' ? 4 : kind == 'U' ? 8 : 0;
    if (num_digits == 0) {
      // Python keeps the backslash of an escape that it does not know.
      *value += '\\';
      return begin + 1;
    }
    const std::string digits = source_.substr(begin + 2, num_digits);
    uint32_t code_point = 0;
    if (digits.size() != num_digits ||
        !std::all_of(digits.begin(), digits.end(), absl::ascii_isxdigit)) {
      return Error("the string has a malformed escape");
    }
    code_point = static_cast<uint32_t>(std::stoul(digits, nullptr, 16));
    if (code_point > 0x10ffff || (code_point >= 0xd800 && code_point < 0xe000)) {
      return Error(absl::StrCat("the string has an escape for no character: ", digits));
    }
    AppendUtf8(code_point, value);
    return begin + 2 + num_digits;
  }

  const std::string& source_;
  size_t position_ = 0;
  int line_ = 1;
  // Whether the last tag ended with a line break, or there was none yet.
  bool is_at_line_start_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

absl::StatusOr<std::vector<Token>> Tokenize(const std::string& source) {
  const std::string normalized = NormalizedSource(source);
  return Lexer(normalized).Run();
}

}  // namespace nestor::chat_template
