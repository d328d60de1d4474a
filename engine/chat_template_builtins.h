#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/chat_template_value.h"

namespace nestor::chat_template {

struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;

  // The argument that is called `name` or stands at `index`; null where there is none.
  const Value* Find(size_t index, const std::string& name) const;
};

// A string or list that a template may build; more is RESOURCE_EXHAUSTED.
inline constexpr size_t kMaxValueSize = size_t{64} << 20;

// Jinja's filters, tests and operators and Python's methods, those that chat templates use. Errors
// are INVALID_ARGUMENT and say what was applied to what.
absl::StatusOr<Value> ApplyFilter(const std::string& name, const Value& input,
                                  const Arguments& arguments);
absl::StatusOr<bool> ApplyTest(const std::string& name, const Value& input,
                               const Arguments& arguments);
absl::StatusOr<Value> CallMethod(const Value& object, const std::string& name,
                                 const Arguments& arguments);
// raise_exception, namespace, dict, range.
absl::StatusOr<Value> CallGlobal(const std::string& name, const Arguments& arguments);

// `op` is one of + - * // %.
absl::StatusOr<Value> Arithmetic(const std::string& op, const Value& left, const Value& right);
// `op` is one of == != < <= > >= in, "not in".
absl::StatusOr<bool> Compare(const std::string& op, const Value& left, const Value& right);
// object[key]; undefined where there is no such item.
absl::StatusOr<Value> GetItem(const Value& object, const Value& key);
// object[start:stop:step] with none for what is left out.
absl::StatusOr<Value> GetSlice(const Value& object, const Value& start, const Value& stop,
                               const Value& step);

}  // namespace nestor::chat_template
