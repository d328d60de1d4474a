#include "engine/tokenizer_json.h"

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

// A dot between members, but not after the "FILE: " that a place starts with.
std::string PlaceOfMember(const std::string& place, const std::string& name) {
  return absl::StrCat(place, absl::EndsWith(place, ": ") ? "" : ".", name);
}

}  // namespace

absl::StatusOr<nlohmann::json> ReadJsonFile(const std::string& path) {
  NESTOR_ASSIGN_OR_RETURN(const std::string content, ReadFile(path));
  try {
    return nlohmann::json::parse(content);
  } catch (const nlohmann::json::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", error.what()));
  }
}

JsonField::JsonField(const nlohmann::json* value, std::string place)
    : value_(value), place_(std::move(place)) {}

JsonField JsonField::Member(const std::string& name) const {
  static const nlohmann::json kNull;
  const bool has_member = value_->is_object() && value_->contains(name);
  return JsonField(has_member ? &(*value_)[name] : &kNull, PlaceOfMember(place_, name));
}

absl::StatusOr<std::vector<JsonField>> JsonField::Entries() const {
  if (!value_->is_array()) return Error(absl::StrCat("must be a list; was ", value_->type_name()));
  std::vector<JsonField> entries;
  entries.reserve(value_->size());
  for (size_t i = 0; i < value_->size(); ++i) {
    entries.emplace_back(&(*value_)[i], absl::StrCat(place_, "[", i, "]"));
  }
  return entries;
}

absl::StatusOr<std::string> JsonField::AsString() const {
  if (!value_->is_string()) {
    return Error(absl::StrCat("must be a string; was ", value_->type_name()));
  }
  return value_->get<std::string>();
}

absl::StatusOr<int64_t> JsonField::AsInt() const {
  if (!value_->is_number_integer()) {
    return Error(absl::StrCat("must be an integer; was ", value_->type_name()));
  }
  return value_->get<int64_t>();
}

absl::StatusOr<std::string> JsonField::GetString(const std::string& name) const {
  return Member(name).AsString();
}

absl::StatusOr<std::string> JsonField::GetString(const std::string& name,
                                                 const std::string& default_value) const {
  const JsonField member = Member(name);
  if (member.is_null()) return default_value;
  return member.AsString();
}

absl::StatusOr<int64_t> JsonField::GetInt(const std::string& name, int64_t default_value) const {
  const JsonField member = Member(name);
  if (member.is_null()) return default_value;
  return member.AsInt();
}

absl::StatusOr<bool> JsonField::GetBool(const std::string& name, bool default_value) const {
  const JsonField member = Member(name);
  if (member.is_null()) return default_value;
  if (!member.value_->is_boolean()) {
    return member.Error(absl::StrCat("must be true or false; was ", member.value_->type_name()));
  }
  return member.value_->get<bool>();
}

absl::Status JsonField::Error(const std::string& message) const {
  return absl::InvalidArgumentError(
      absl::StrCat(place_, absl::EndsWith(place_, ": ") ? "" : ": ", message));
}

}  // namespace nestor
