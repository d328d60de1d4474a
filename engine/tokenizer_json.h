#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace nestor {

// INVALID_ARGUMENT names the file and the place where it is no JSON; NOT_FOUND as ReadFile.
absl::StatusOr<nlohmann::json> ReadJsonFile(const std::string& path);

// A value of a JSON file together with its place, so that every error can name file and field:
// "m/tokenizer.json: normalizer.normalizers[1].type: ...". Getters return INVALID_ARGUMENT where
// the field is missing (and has no default) or has another type; null counts as missing.
class JsonField {
 public:
  // `value` is borrowed and must outlive this.
  JsonField(const nlohmann::json* value, std::string place);

  bool is_null() const { return value_->is_null(); }
  const nlohmann::json& value() const { return *value_; }

  // Null where this has no such member.
  JsonField Member(const std::string& name) const;
  // The entries of this list; an error where it is none.
  absl::StatusOr<std::vector<JsonField>> Entries() const;
  // This value itself.
  absl::StatusOr<std::string> AsString() const;
  absl::StatusOr<int64_t> AsInt() const;

  absl::StatusOr<std::string> GetString(const std::string& name) const;
  absl::StatusOr<std::string> GetString(const std::string& name,
                                        const std::string& default_value) const;
  absl::StatusOr<int64_t> GetInt(const std::string& name, int64_t default_value) const;
  absl::StatusOr<bool> GetBool(const std::string& name, bool default_value) const;

  // INVALID_ARGUMENT "PLACE: MESSAGE".
  absl::Status Error(const std::string& message) const;

 private:
  const nlohmann::json* value_;
  std::string place_;
};

}  // namespace nestor
