#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/chat_template_builtins.h"
#include "engine/unicode.h"

namespace nestor::chat_template {
namespace {

using Kind = Value::Kind;

std::string NameOf(const Value& value) { return std::string(value.KindName()); }

absl::Status Mismatch(const std::string& op, const Value& left, const Value& right) {
  return absl::InvalidArgumentError(
      absl::StrCat("operator '", op, "' between ", NameOf(left), " and ", NameOf(right)));
}

absl::Status TooLarge() {
  return absl::ResourceExhaustedError(
      absl::StrCat("a value is larger than ", kMaxValueSize, " bytes"));
}

absl::StatusOr<Value> Add(const Value& left, const Value& right) {
  if (left.Is(Kind::kString) && right.Is(Kind::kString)) {
    if (left.AsString().size() + right.AsString().size() > kMaxValueSize) return TooLarge();
    return Value::String(left.AsString() + right.AsString());
  }
  if (left.Is(Kind::kList) && right.Is(Kind::kList)) {
    const size_t size = left.AsList().size() + right.AsList().size();
    if (size > kMaxValueSize / sizeof(Value)) return TooLarge();
    Value::List joined = left.AsList();
    joined.insert(joined.end(), right.AsList().begin(), right.AsList().end());
    return Value::FromList(std::move(joined));
  }
  return Mismatch("+", left, right);
}

absl::StatusOr<Value> Repeat(const std::string& text, int64_t count) {
  if (count <= 0 || text.empty()) return Value::String("");
  if (static_cast<uint64_t>(count) > kMaxValueSize / text.size()) return TooLarge();
  std::string repeated;
  repeated.reserve(text.size() * static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) repeated += text;
  return Value::String(std::move(repeated));
}

// Division that rounds down and the remainder with the divisor's sign, as in Python.
absl::StatusOr<Value> Divide(const std::string& op, int64_t left, int64_t right) {
  if (right == 0) return absl::InvalidArgumentError("division by zero");
  if (right == -1 && left == INT64_MIN) return absl::InvalidArgumentError("integer overflow");
  int64_t quotient = left / right;
  int64_t remainder = left % right;
  if (remainder != 0 && (remainder < 0) != (right < 0)) {
    --quotient;
    remainder += right;
  }
  return Value::Int(op == "%" ? remainder : quotient);
}

absl::StatusOr<bool> Contains(const Value& container, const Value& item) {
  switch (container.kind()) {
    case Kind::kString:
      if (!item.Is(Kind::kString)) return Mismatch("in", item, container);
      return absl::StrContains(container.AsString(), item.AsString());
    case Kind::kDict:
      return item.Is(Kind::kString) && container.Find(item.AsString()) != nullptr;
    case Kind::kList:
      return std::any_of(container.AsList().begin(), container.AsList().end(),
                         [&item](const Value& other) { return other.Equals(item); });
    case Kind::kUndefined:
      return false;
    default:
      return Mismatch("in", item, container);
  }
}

// The slice's indices into `size` items, in order (Python's slice.indices).
absl::StatusOr<std::vector<size_t>> SliceIndices(int64_t size, const Value& start,
                                                 const Value& stop, const Value& step_value) {
  for (const Value* part : {&start, &stop, &step_value}) {
    if (!part->Is(Kind::kNone) && !part->IsNumber()) {
      return absl::InvalidArgumentError(absl::StrCat("a slice with ", NameOf(*part)));
    }
  }
  const int64_t step = step_value.Is(Kind::kNone) ? 1 : step_value.AsInt();
  if (step == 0) return absl::InvalidArgumentError("a slice with step 0");
  const int64_t lowest = step > 0 ? 0 : -1;
  const int64_t highest = step > 0 ? size : size - 1;
  const auto bound = [&](const Value& value, int64_t otherwise) {
    if (value.Is(Kind::kNone)) return otherwise;
    const int64_t index = value.AsInt();
    if (index >= 0) return std::min(index, highest);
    return index < -size ? lowest : std::max(index + size, lowest);
  };
  const int64_t first = bound(start, step > 0 ? lowest : highest);
  const int64_t end = bound(stop, step > 0 ? highest : lowest);
  std::vector<size_t> indices;
  // A step beyond the size takes one item; clamped so that the sum cannot overflow.
  const int64_t stride = std::clamp(step, -size - 1, size + 1);
  for (int64_t i = first; stride > 0 ? i < end : i > end; i += stride) {
    indices.push_back(static_cast<size_t>(i));
  }
  return indices;
}

}  // namespace

absl::StatusOr<Value> Arithmetic(const std::string& op, const Value& left, const Value& right) {
  if (op == "*" && left.Is(Kind::kString) && right.IsNumber()) {
    return Repeat(left.AsString(), right.AsInt());
  }
  if (!left.IsNumber() || !right.IsNumber()) {
    return op == "+" ? Add(left, right) : Mismatch(op, left, right);
  }
  if (op == "//" || op == "%") return Divide(op, left.AsInt(), right.AsInt());
  int64_t result = 0;
  const bool has_overflow = op == "+" ? __builtin_add_overflow(left.AsInt(), right.AsInt(), &result)
                            : op == "-"
                                ? __builtin_sub_overflow(left.AsInt(), right.AsInt(), &result)
                                : __builtin_mul_overflow(left.AsInt(), right.AsInt(), &result);
  if (has_overflow) return absl::InvalidArgumentError("integer overflow");
  return Value::Int(result);
}

absl::StatusOr<bool> Compare(const std::string& op, const Value& left, const Value& right) {
  if (op == "==") return left.Equals(right);
  if (op == "!=") return !left.Equals(right);
  if (op == "in") return Contains(right, left);
  if (op == "not in") {
    NESTOR_ASSIGN_OR_RETURN(const bool contains, Contains(right, left));
    return !contains;
  }
  int order = 0;
  if (left.IsNumber() && right.IsNumber()) {
    order = left.AsInt() < right.AsInt() ? -1 : left.AsInt() > right.AsInt() ? 1 : 0;
  } else if (left.Is(Kind::kString) && right.Is(Kind::kString)) {
    order = left.AsString().compare(right.AsString());
  } else {
    return Mismatch(op, left, right);
  }
  if (op == "<") return order < 0;
  if (op == "<=") return order <= 0;
  if (op == ">") return order > 0;
  return order >= 0;
}

absl::StatusOr<Value> GetItem(const Value& object, const Value& key) {
  const std::string key_name = key.Is(Kind::kString) ? key.AsString()
                               : key.IsNumber()      ? absl::StrCat("item ", key.AsInt())
                                                     : NameOf(key);
  if (object.Is(Kind::kUndefined)) {
    return absl::InvalidArgumentError(absl::StrCat("'", object.UndefinedName(), "' is undefined"));
  }
  if (object.Is(Kind::kDict) && key.Is(Kind::kString)) {
    const Value* value = object.Find(key.AsString());
    return value == nullptr ? Value::Undefined(key_name) : *value;
  }
  const bool is_sequence = object.Is(Kind::kList) || object.Is(Kind::kString);
  if (!is_sequence || !key.IsNumber()) return Value::Undefined(key_name);
  NESTOR_ASSIGN_OR_RETURN(const Value::List items, object.ToItems());
  const int64_t size = static_cast<int64_t>(items.size());
  const int64_t index = key.AsInt() < 0 ? key.AsInt() + size : key.AsInt();
  if (index < 0 || index >= size) return Value::Undefined(key_name);
  return items[static_cast<size_t>(index)];
}

absl::StatusOr<Value> GetSlice(const Value& object, const Value& start, const Value& stop,
                               const Value& step) {
  if (!object.Is(Kind::kList) && !object.Is(Kind::kString)) {
    return absl::InvalidArgumentError(absl::StrCat("a slice of ", NameOf(object)));
  }
  NESTOR_ASSIGN_OR_RETURN(const Value::List items, object.ToItems());
  NESTOR_ASSIGN_OR_RETURN(const std::vector<size_t> indices,
                          SliceIndices(static_cast<int64_t>(items.size()), start, stop, step));
  if (object.Is(Kind::kString)) {
    std::string text;
    for (const size_t index : indices) text += items[index].AsString();
    return Value::String(std::move(text));
  }
  Value::List slice;
  for (const size_t index : indices) slice.push_back(items[index]);
  return Value::FromList(std::move(slice));
}

}  // namespace nestor::chat_template
