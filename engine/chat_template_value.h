#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"

namespace nestor::chat_template {

// A value of a chat template's expressions, with Python's meaning. Immutable; strings are UTF-8 and
// indexed by character.
class Value {
 public:
  using List = std::vector<Value>;
  // In order of insertion.
  using Dict = std::vector<std::pair<std::string, Value>>;
  enum class Kind { kUndefined, kNone, kBool, kInt, kString, kList, kDict };

  // Undefined; `name` is what errors call it.
  static Value Undefined(std::string name);
  static Value None();
  static Value Bool(bool value);
  static Value Int(int64_t value);
  static Value String(std::string value);
  static Value FromList(List items);
  static Value FromDict(Dict items);

  Kind kind() const { return static_cast<Kind>(storage_.index()); }
  bool Is(Kind kind) const { return this->kind() == kind; }
  bool IsNumber() const { return Is(Kind::kBool) || Is(Kind::kInt); }
  // "a string", "a list", ... for errors.
  std::string_view KindName() const;

  // REQUIRES of each: the kind; AsInt takes booleans too.
  const std::string& UndefinedName() const { return std::get<UndefinedValue>(storage_).name; }
  int64_t AsInt() const;
  const std::string& AsString() const { return std::get<std::string>(storage_); }
  const List& AsList() const { return *std::get<ListPointer>(storage_); }
  const Dict& AsDict() const { return *std::get<DictPointer>(storage_); }

  bool IsTrue() const;
  bool Equals(const Value& other) const;
  // Null where this is no dictionary or has no such key.
  const Value* Find(std::string_view key) const;

  // What is printed. INVALID_ARGUMENT for lists and dictionaries.
  absl::StatusOr<std::string> ToText() const;
  // As Python's json.dumps(ensure_ascii=False); `indent` < 0 writes one line.
  absl::StatusOr<std::string> ToJson(int64_t indent) const;
  // The items of a list, the keys of a dictionary, the characters of a string; none of undefined.
  absl::StatusOr<List> ToItems() const;

 private:
  struct UndefinedValue {
    std::string name;
  };
  // Shared although our values are otherwise owned: evaluating a name must not copy a conversation.
  using ListPointer = std::shared_ptr<const List>;
  using DictPointer = std::shared_ptr<const Dict>;

  absl::Status AppendJson(int64_t indent, int64_t depth, std::string* out) const;

  // In the order of Kind.
  std::variant<UndefinedValue, std::monostate, bool, int64_t, std::string, ListPointer, DictPointer>
      storage_;
};

}  // namespace nestor::chat_template
