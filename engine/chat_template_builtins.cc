#include "engine/chat_template_builtins.h"

#include <unicode/locid.h>
#include <unicode/unistr.h>

#include <algorithm>
#include <string_view>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/status_macros.h"
#include "engine/unicode.h"

namespace nestor::chat_template {
namespace {

using Kind = Value::Kind;

// The bound of Jinja's sandbox.
constexpr int64_t kMaxRange = 100000;

std::string NameOf(const Value& value) { return std::string(value.KindName()); }

absl::Status Misapplied(const std::string& name, const Value& input) {
  return absl::InvalidArgumentError(absl::StrCat("'", name, "' of ", NameOf(input)));
}

// A string argument, "" where it is left out.
absl::StatusOr<std::string> StringArgument(const Arguments& arguments, size_t index,
                                           const std::string& name) {
  const Value* value = arguments.Find(index, name);
  if (value == nullptr || value->Is(Kind::kNone)) return "";
  if (!value->Is(Kind::kString)) {
    return absl::InvalidArgumentError(
        absl::StrCat("argument '", name, "' must be a string; was ", NameOf(*value)));
  }
  return value->AsString();
}

enum class Side { kBoth, kLeft, kRight };

// Python's str.strip: without `characters`, white space.
std::string Stripped(std::string_view text, const std::string& characters, Side side) {
  const auto is_stripped = [&characters](std::string_view character, char32_t c) {
    if (!characters.empty()) return characters.find(character) != std::string::npos;
    return IsWhitespace(c) || (c >= 0x1c && c <= 0x1f);
  };
  size_t begin = text.size();  // of the first character that stays
  size_t end = 0;              // of the last one
  for (size_t i = 0; i < text.size();) {
    const size_t start = i;
    const char32_t c = NextCodePoint(text, &i);
    if (is_stripped(text.substr(start, i - start), c)) continue;
    begin = std::min(begin, start);
    end = i;
  }
  if (end == 0) return "";
  if (side == Side::kLeft) end = text.size();
  if (side == Side::kRight) begin = 0;
  return std::string(text.substr(begin, end - begin));
}

enum class LetterCase { kUpper, kLower, kTitle, kCapitalized };

std::string WithCase(const std::string& text, LetterCase letter_case) {
  icu::UnicodeString utf16 = icu::UnicodeString::fromUTF8(text);
  const icu::Locale& locale = icu::Locale::getRoot();
  switch (letter_case) {
    case LetterCase::kUpper:
      utf16.toUpper(locale);
      break;
    case LetterCase::kLower:
      utf16.toLower(locale);
      break;
    case LetterCase::kTitle:
      utf16.toTitle(nullptr, locale);
      break;
    case LetterCase::kCapitalized: {
      const int32_t first = utf16.moveIndex32(0, 1);
      const icu::UnicodeString rest(utf16, first);
      utf16.truncate(first);
      utf16.toUpper(locale).append(icu::UnicodeString(rest).toLower(locale));
      break;
    }
  }
  std::string out;
  utf16.toUTF8String(out);
  return out;
}

// Python's str.split, without a separator at runs of white space.
Value Split(const std::string& text, const std::string& separator, int64_t max_splits) {
  Value::List parts;
  std::string_view rest = text;
  while (max_splits < 0 || static_cast<int64_t>(parts.size()) < max_splits) {
    size_t end = rest.find(separator);
    if (end == std::string_view::npos) break;
    parts.push_back(Value::String(std::string(rest.substr(0, end))));
    rest.remove_prefix(end + separator.size());
  }
  parts.push_back(Value::String(std::string(rest)));
  return Value::FromList(std::move(parts));
}

Value SplitAtWhitespace(const std::string& text) {
  Value::List parts;
  size_t word = 0;  // start of the current one
  for (size_t i = 0; i < text.size();) {
    const size_t start = i;
    if (!IsWhitespace(NextCodePoint(text, &i))) continue;
    if (word < start) parts.push_back(Value::String(text.substr(word, start - word)));
    word = i;
  }
  if (word < text.size()) parts.push_back(Value::String(text.substr(word)));
  return Value::FromList(std::move(parts));
}

absl::StatusOr<Value> Replace(const std::string& text, const Arguments& arguments) {
  NESTOR_ASSIGN_OR_RETURN(const std::string from, StringArgument(arguments, 0, "old"));
  NESTOR_ASSIGN_OR_RETURN(const std::string to, StringArgument(arguments, 1, "new"));
  if (from.empty()) return absl::InvalidArgumentError("'replace' of an empty string");
  if (text.size() / from.size() * to.size() > kMaxValueSize) {
    return absl::ResourceExhaustedError("'replace' makes too long a string");
  }
  return Value::String(absl::StrReplaceAll(text, {{from, to}}));
}

// Of a dictionary: [[key, value], ...].
Value ItemPairs(const Value& dict) {
  Value::List pairs;
  for (const auto& [key, value] : dict.AsDict()) {
    pairs.push_back(Value::FromList({Value::String(key), value}));
  }
  return Value::FromList(std::move(pairs));
}

absl::StatusOr<Value> CallDictMethod(const Value& dict, const std::string& name,
                                     const Arguments& arguments) {
  if (name == "items") return ItemPairs(dict);
  if (name == "get") {
    NESTOR_ASSIGN_OR_RETURN(const std::string key, StringArgument(arguments, 0, "key"));
    const Value* value = dict.Find(key);
    if (value != nullptr) return *value;
    const Value* otherwise = arguments.Find(1, "default");
    return otherwise == nullptr ? Value::None() : *otherwise;
  }
  Value::List list;
  for (const auto& [key, value] : dict.AsDict()) {
    list.push_back(name == "keys" ? Value::String(key) : value);
  }
  if (name == "keys" || name == "values") return Value::FromList(std::move(list));
  return absl::InvalidArgumentError(absl::StrCat("method '", name, "' is not supported"));
}

absl::StatusOr<Value> CallSplit(const std::string& text, const Arguments& arguments) {
  const Value* separator = arguments.Find(0, "sep");
  if (separator == nullptr || separator->Is(Kind::kNone)) return SplitAtWhitespace(text);
  NESTOR_ASSIGN_OR_RETURN(const std::string mark, StringArgument(arguments, 0, "sep"));
  if (mark.empty()) return absl::InvalidArgumentError("'split' with an empty separator");
  const Value* max_splits = arguments.Find(1, "maxsplit");
  const bool has_bound = max_splits != nullptr && max_splits->IsNumber();
  return Split(text, mark, has_bound ? max_splits->AsInt() : -1);
}

absl::StatusOr<Value> CallStringMethod(const std::string& text, const std::string& name,
                                       const Arguments& arguments) {
  if (name == "split") return CallSplit(text, arguments);
  if (name == "replace") return Replace(text, arguments);
  if (name == "upper") return Value::String(WithCase(text, LetterCase::kUpper));
  if (name == "lower") return Value::String(WithCase(text, LetterCase::kLower));
  if (name == "title") return Value::String(WithCase(text, LetterCase::kTitle));
  if (name == "capitalize") return Value::String(WithCase(text, LetterCase::kCapitalized));
  NESTOR_ASSIGN_OR_RETURN(const std::string argument, StringArgument(arguments, 0, "chars"));
  if (name == "strip") return Value::String(Stripped(text, argument, Side::kBoth));
  if (name == "lstrip") return Value::String(Stripped(text, argument, Side::kLeft));
  if (name == "rstrip") return Value::String(Stripped(text, argument, Side::kRight));
  if (name == "startswith") return Value::Bool(text.starts_with(argument));
  if (name == "endswith") return Value::Bool(text.ends_with(argument));
  return absl::InvalidArgumentError(absl::StrCat("method '", name, "' is not supported"));
}

absl::StatusOr<Value> Length(const Value& input) {
  if (input.Is(Kind::kString)) {
    return Value::Int(static_cast<int64_t>(CountCodePoints(input.AsString())));
  }
  absl::StatusOr<Value::List> items = input.ToItems();
  if (!items.ok()) return Misapplied("length", input);
  return Value::Int(static_cast<int64_t>(items->size()));
}

absl::StatusOr<Value> Join(const Value& input, const Arguments& arguments) {
  NESTOR_ASSIGN_OR_RETURN(const std::string separator, StringArgument(arguments, 0, "d"));
  NESTOR_ASSIGN_OR_RETURN(const Value::List items, input.ToItems());
  const Value* attribute = arguments.Find(1, "attribute");
  std::string joined;
  bool is_first = true;
  for (const Value& item : items) {
    if (!is_first) joined += separator;
    is_first = false;
    Value printed = item;
    if (attribute != nullptr) {
      NESTOR_ASSIGN_OR_RETURN(printed, GetItem(item, *attribute));
    }
    NESTOR_ASSIGN_OR_RETURN(const std::string text, printed.ToText());
    joined += text;
    if (joined.size() > kMaxValueSize) {
      return absl::ResourceExhaustedError("'join' makes too long a string");
    }
  }
  return Value::String(std::move(joined));
}

// selectattr and rejectattr: the items whose attribute passes (fails) a test.
absl::StatusOr<Value> Select(const Value& input, const Arguments& arguments, bool selects) {
  NESTOR_ASSIGN_OR_RETURN(const std::string attribute, StringArgument(arguments, 0, "attribute"));
  NESTOR_ASSIGN_OR_RETURN(const std::string test, StringArgument(arguments, 1, "test"));
  Arguments test_arguments;
  for (size_t i = 2; i < arguments.positional.size(); ++i) {
    test_arguments.positional.push_back(arguments.positional[i]);
  }
  NESTOR_ASSIGN_OR_RETURN(const Value::List items, input.ToItems());
  Value::List selected;
  for (const Value& item : items) {
    NESTOR_ASSIGN_OR_RETURN(const Value value, GetItem(item, Value::String(attribute)));
    bool passes = value.IsTrue();
    if (!test.empty()) {
      NESTOR_ASSIGN_OR_RETURN(passes, ApplyTest(test, value, test_arguments));
    }
    if (passes == selects) selected.push_back(item);
  }
  return Value::FromList(std::move(selected));
}

// map("filter", ...) and map(attribute="name").
absl::StatusOr<Value> Map(const Value& input, const Arguments& arguments) {
  NESTOR_ASSIGN_OR_RETURN(const Value::List items, input.ToItems());
  const Value* attribute = arguments.Find(SIZE_MAX, "attribute");
  NESTOR_ASSIGN_OR_RETURN(const std::string filter, StringArgument(arguments, 0, "filter"));
  Arguments rest = arguments;
  if (!rest.positional.empty()) rest.positional.erase(rest.positional.begin());
  Value::List mapped;
  for (const Value& item : items) {
    NESTOR_ASSIGN_OR_RETURN(Value value, attribute != nullptr ? GetItem(item, *attribute)
                                                              : ApplyFilter(filter, item, rest));
    mapped.push_back(std::move(value));
  }
  return Value::FromList(std::move(mapped));
}

absl::StatusOr<Value> ToJsonFilter(const Value& input, const Arguments& arguments) {
  // Jinja's filter takes the indentation first, transformers' has ensure_ascii before it.
  const Value* indent = arguments.Find(SIZE_MAX, "indent");
  constexpr int64_t kMaxIndent = 16;
  const bool has_indent = indent != nullptr && indent->IsNumber();
  if (has_indent && (indent->AsInt() < 0 || indent->AsInt() > kMaxIndent)) {
    return absl::InvalidArgumentError(
        absl::StrCat("'tojson' with an indentation of ", indent->AsInt()));
  }
  NESTOR_ASSIGN_OR_RETURN(std::string json, input.ToJson(has_indent ? indent->AsInt() : -1));
  return Value::String(std::move(json));
}

// Filters of a string; other values are printed first, as Jinja does.
absl::StatusOr<Value> ApplyStringFilter(const std::string& name, const Value& input,
                                        const Arguments& arguments) {
  NESTOR_ASSIGN_OR_RETURN(const std::string text, input.ToText());
  if (name == "string") return Value::String(text);
  if (name == "trim") return CallStringMethod(text, "strip", arguments);
  if (name == "int") {
    int64_t number = 0;
    return Value::Int(absl::SimpleAtoi(text, &number) ? number : 0);
  }
  return CallStringMethod(text, name, arguments);
}

absl::StatusOr<Value> FirstOrLast(const Value& input, bool is_first) {
  NESTOR_ASSIGN_OR_RETURN(const Value::List items, input.ToItems());
  if (items.empty()) return Value::Undefined(is_first ? "first item" : "last item");
  return is_first ? items.front() : items.back();
}

}  // namespace

const Value* Arguments::Find(size_t index, const std::string& name) const {
  for (const auto& [key, value] : named) {
    if (key == name) return &value;
  }
  return index < positional.size() ? &positional[index] : nullptr;
}

absl::StatusOr<Value> ApplyFilter(const std::string& name, const Value& input,
                                  const Arguments& arguments) {
  for (const char* filter :
       {"trim", "upper", "lower", "title", "capitalize", "replace", "string", "int"}) {
    if (name == filter) return ApplyStringFilter(name, input, arguments);
  }
  if (name == "length" || name == "count") return Length(input);
  if (name == "join") return Join(input, arguments);
  if (name == "first" || name == "last") return FirstOrLast(input, name == "first");
  if (name == "tojson") return ToJsonFilter(input, arguments);
  if (name == "selectattr" || name == "rejectattr") {
    return Select(input, arguments, name == "selectattr");
  }
  if (name == "map") return Map(input, arguments);
  if (name == "safe") return input;
  if (name == "list") {
    NESTOR_ASSIGN_OR_RETURN(Value::List items, input.ToItems());
    return Value::FromList(std::move(items));
  }
  if (name == "items") {
    if (input.Is(Kind::kUndefined)) return Value::FromList({});
    if (input.Is(Kind::kDict)) return ItemPairs(input);
    return Misapplied(name, input);
  }
  if (name == "default" || name == "d") {
    const Value* otherwise = arguments.Find(0, "default_value");
    const Value* for_false = arguments.Find(1, "boolean");
    const bool replaces_false = for_false != nullptr && for_false->IsTrue();
    if (!input.Is(Kind::kUndefined) && (!replaces_false || input.IsTrue())) return input;
    return otherwise == nullptr ? Value::String("") : *otherwise;
  }
  return absl::InvalidArgumentError(absl::StrCat("filter '", name, "' is not supported"));
}

absl::StatusOr<bool> ApplyTest(const std::string& name, const Value& input,
                               const Arguments& arguments) {
  if (name == "defined") return !input.Is(Kind::kUndefined);
  if (name == "undefined") return input.Is(Kind::kUndefined);
  if (name == "none") return input.Is(Kind::kNone);
  if (name == "string") return input.Is(Kind::kString);
  if (name == "mapping") return input.Is(Kind::kDict);
  if (name == "number") return input.IsNumber();
  if (name == "integer") return input.Is(Kind::kInt);
  if (name == "boolean") return input.Is(Kind::kBool);
  if (name == "true" || name == "false") {
    return input.Is(Kind::kBool) && input.IsTrue() == (name == "true");
  }
  const bool is_iterable = !input.IsNumber() && !input.Is(Kind::kNone);
  if (name == "iterable" || name == "sequence") return is_iterable;
  const Value* argument = arguments.Find(0, "other");
  if (argument != nullptr) {
    if (name == "equalto" || name == "eq") return input.Equals(*argument);
    if (name == "ne") return !input.Equals(*argument);
    if (name == "in") return Compare("in", input, *argument);
  }
  const bool is_divisibility = name == "odd" || name == "even" || name == "divisibleby";
  if (is_divisibility) {
    const Value divisor = argument == nullptr ? Value::Int(2) : *argument;
    NESTOR_ASSIGN_OR_RETURN(const Value remainder, Arithmetic("%", input, divisor));
    return (remainder.AsInt() == 0) != (name == "odd");
  }
  return absl::InvalidArgumentError(absl::StrCat("test '", name, "' is not supported"));
}

absl::StatusOr<Value> CallMethod(const Value& object, const std::string& name,
                                 const Arguments& arguments) {
  if (object.Is(Kind::kUndefined)) {
    return absl::InvalidArgumentError(absl::StrCat("'", object.UndefinedName(), "' is undefined"));
  }
  if (object.Is(Kind::kString)) return CallStringMethod(object.AsString(), name, arguments);
  if (object.Is(Kind::kDict)) return CallDictMethod(object, name, arguments);
  return absl::InvalidArgumentError(
      absl::StrCat("method '", name, "' of ", NameOf(object), " is not supported"));
}

absl::StatusOr<Value> CallGlobal(const std::string& name, const Arguments& arguments) {
  if (name == "raise_exception") {
    NESTOR_ASSIGN_OR_RETURN(const std::string message, StringArgument(arguments, 0, "message"));
    return absl::InvalidArgumentError(message);
  }
  if (name == "namespace" || name == "dict") return Value::FromDict(arguments.named);
  if (name == "range") {
    const bool has_start = arguments.positional.size() > 1;
    const bool has_step = arguments.positional.size() > 2;
    for (const Value& argument : arguments.positional) {
      if (!argument.IsNumber()) return Misapplied(name, argument);
    }
    if (arguments.positional.empty()) return absl::InvalidArgumentError("'range' of nothing");
    const int64_t start = has_start ? arguments.positional[0].AsInt() : 0;
    const int64_t stop = arguments.positional[has_start ? 1 : 0].AsInt();
    const int64_t step = has_step ? arguments.positional[2].AsInt() : 1;
    for (const int64_t bound : {start, stop, step}) {
      if (bound < -kMaxRange || bound > kMaxRange) {
        return absl::InvalidArgumentError(absl::StrCat("'range' to ", bound, " is too long"));
      }
    }
    if (step == 0) return absl::InvalidArgumentError("'range' with step 0");
    Value::List items;
    for (int64_t i = start; step > 0 ? i < stop : i > stop; i += step) {
      items.push_back(Value::Int(i));
    }
    return Value::FromList(std::move(items));
  }
  return absl::InvalidArgumentError(absl::StrCat("function '", name, "' is not supported"));
}

}  // namespace nestor::chat_template
