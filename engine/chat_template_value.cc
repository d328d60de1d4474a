#include "engine/chat_template_value.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/unicode.h"
#include "nlohmann/json.hpp"

namespace nestor::chat_template {
namespace {

// Deeper values come from no message; bounds the recursion.
constexpr int64_t kMaxJsonDepth = 64;

void AppendLineBreak(int64_t indent, int64_t depth, std::string* out) {
  if (indent < 0) return;
  *out += '\n';
  out->append(static_cast<size_t>(indent * depth), ' ');
}

std::string JsonString(const std::string& text) { return nlohmann::json(text).dump(); }

}  // namespace

Value Value::Undefined(std::string name) {
  Value value;
  value.storage_ = UndefinedValue{std::move(name)};
  return value;
}

Value Value::None() {
  Value value;
  value.storage_ = std::monostate();
  return value;
}

Value Value::Bool(bool boolean) {
  Value value;
  value.storage_ = boolean;
  return value;
}

Value Value::Int(int64_t integer) {
  Value value;
  value.storage_ = integer;
  return value;
}

Value Value::String(std::string text) {
  Value value;
  value.storage_ = std::move(text);
  return value;
}

Value Value::FromList(List items) {
  Value value;
  value.storage_ = std::make_shared<const List>(std::move(items));
  return value;
}

Value Value::FromDict(Dict items) {
  Value value;
  value.storage_ = std::make_shared<const Dict>(std::move(items));
  return value;
}

std::string_view Value::KindName() const {
  switch (kind()) {
    case Kind::kUndefined:
      return "undefined";
    case Kind::kNone:
      return "none";
    case Kind::kBool:
      return "a boolean";
    case Kind::kInt:
      return "an integer";
    case Kind::kString:
      return "a string";
    case Kind::kList:
      return "a list";
    case Kind::kDict:
      return "a dictionary";
  }
  return "";
}

int64_t Value::AsInt() const {
  if (Is(Kind::kBool)) return std::get<bool>(storage_) ? 1 : 0;
  return std::get<int64_t>(storage_);
}

bool Value::IsTrue() const {
  switch (kind()) {
    case Kind::kUndefined:
    case Kind::kNone:
      return false;
    case Kind::kBool:
    case Kind::kInt:
      return AsInt() != 0;
    case Kind::kString:
      return !AsString().empty();
    case Kind::kList:
      return !AsList().empty();
    case Kind::kDict:
      return !AsDict().empty();
  }
  return false;
}

bool Value::Equals(const Value& other) const {
  if (IsNumber() && other.IsNumber()) return AsInt() == other.AsInt();
  if (kind() != other.kind()) return false;
  switch (kind()) {
    case Kind::kString:
      return AsString() == other.AsString();
    case Kind::kList:
      return std::equal(AsList().begin(), AsList().end(), other.AsList().begin(),
                        other.AsList().end(),
                        [](const Value& a, const Value& b) { return a.Equals(b); });
    case Kind::kDict:
      return AsDict().size() == other.AsDict().size() &&
             std::all_of(AsDict().begin(), AsDict().end(), [&other](const auto& item) {
               const Value* twin = other.Find(item.first);
               return twin != nullptr && item.second.Equals(*twin);
             });
    default:
      return true;
  }
}

const Value* Value::Find(std::string_view key) const {
  if (!Is(Kind::kDict)) return nullptr;
  for (const auto& [name, value] : AsDict()) {
    if (name == key) return &value;
  }
  return nullptr;
}

absl::StatusOr<std::string> Value::ToText() const {
  switch (kind()) {
    case Kind::kUndefined:
      return "";
    case Kind::kNone:
      return "None";
    case Kind::kBool:
      return AsInt() != 0 ? "True" : "False";
    case Kind::kInt:
      return absl::StrCat(AsInt());
    case Kind::kString:
      return AsString();
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("printing ", absl::string_view(KindName().data(), KindName().size()),
                       " is not supported"));
  }
}

absl::StatusOr<std::string> Value::ToJson(int64_t indent) const {
  std::string out;
  NESTOR_RETURN_IF_ERROR(AppendJson(indent, 1, &out));
  return out;
}

absl::Status Value::AppendJson(int64_t indent, int64_t depth, std::string* out) const {
  if (depth > kMaxJsonDepth) return absl::InvalidArgumentError("tojson: nested too deeply");
  const char* const separator = indent < 0 ? ", " : ",";
  bool is_first = true;
  switch (kind()) {
    case Kind::kUndefined:
      return absl::InvalidArgumentError(absl::StrCat("'", UndefinedName(), "' is undefined"));
    case Kind::kNone:
      *out += "null";
      break;
    case Kind::kBool:
      *out += AsInt() != 0 ? "true" : "false";
      break;
    case Kind::kInt:
      absl::StrAppend(out, AsInt());
      break;
    case Kind::kString:
      *out += JsonString(AsString());
      break;
    case Kind::kList:
      *out += '[';
      for (const Value& item : AsList()) {
        if (!is_first) *out += separator;
        is_first = false;
        AppendLineBreak(indent, depth, out);
        NESTOR_RETURN_IF_ERROR(item.AppendJson(indent, depth + 1, out));
      }
      if (!is_first) AppendLineBreak(indent, depth - 1, out);
      *out += ']';
      break;
    case Kind::kDict:
      *out += '{';
      for (const auto& [key, item] : AsDict()) {
        if (!is_first) *out += separator;
        is_first = false;
        AppendLineBreak(indent, depth, out);
        absl::StrAppend(out, JsonString(key), ": ");
        NESTOR_RETURN_IF_ERROR(item.AppendJson(indent, depth + 1, out));
      }
      if (!is_first) AppendLineBreak(indent, depth - 1, out);
      *out += '}';
      break;
  }
  return absl::OkStatus();
}

absl::StatusOr<Value::List> Value::ToItems() const {
  List items;
  switch (kind()) {
    case Kind::kUndefined:
      break;
    case Kind::kList:
      return AsList();
    case Kind::kDict:
      for (const auto& [key, item] : AsDict()) items.push_back(String(key));
      break;
    case Kind::kString:
      for (size_t i = 0; i < AsString().size();) {
        const size_t begin = i;
        NextCodePoint(AsString(), &i);
        items.push_back(String(AsString().substr(begin, i - begin)));
      }
      break;
    default:
      return absl::InvalidArgumentError(absl::StrCat(
          absl::string_view(KindName().data(), KindName().size()), " cannot be iterated over"));
  }
  return items;
}

}  // namespace nestor::chat_template
