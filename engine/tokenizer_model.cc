#include "engine/tokenizer_model.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

// Far above every published vocabulary; keeps a corrupt id from taking all memory.
constexpr int64_t kMaxTokenId = 1 << 24;

}  // namespace

absl::StatusOr<Vocabulary> Vocabulary::Parse(const JsonField& field) {
  if (!field.value().is_object() || field.value().empty()) {
    return field.Error("must be an object of tokens and ids, not empty");
  }
  Vocabulary vocabulary;
  vocabulary.ids_.reserve(field.value().size());
  std::vector<bool> is_used;
  for (const auto& [token, value] : field.value().items()) {
    NESTOR_ASSIGN_OR_RETURN(const int64_t id, field.Member(token).AsInt());
    if (id < 0 || id > kMaxTokenId) {
      return field.Member(token).Error(absl::StrCat("id out of range; was ", id));
    }
    const size_t index = static_cast<size_t>(id);
    if (index >= is_used.size()) {
      is_used.resize(index + 1);
      vocabulary.tokens_.resize(index + 1);
    }
    if (is_used[index]) {
      return field.Member(token).Error(
          absl::StrCat("id ", id, " is also that of \"", vocabulary.tokens_[index], "\""));
    }
    is_used[index] = true;
    vocabulary.tokens_[index] = token;
    vocabulary.ids_.emplace(token, static_cast<int32_t>(id));
  }
  return vocabulary;
}

std::optional<int32_t> Vocabulary::IdOf(std::string_view token) const {
  const auto found = ids_.find(absl::string_view(token.data(), token.size()));
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

absl::StatusOr<std::unique_ptr<TokenizerModel>> ParseTokenizerModel(const JsonField& field) {
  if (field.is_null()) return field.Error("is missing");
  // Files of the first versions leave the type out and are told apart by their fields.
  const std::string implied = field.Member("merges").is_null() ? "WordPiece" : "BPE";
  NESTOR_ASSIGN_OR_RETURN(const std::string type, field.GetString("type", implied));
  if (type == "BPE") return ParseBpeModel(field);
  if (type == "WordPiece") return ParseWordPieceModel(field);
  return field.Member("type").Error(absl::StrCat("model \"", type, "\" is not supported"));
}

}  // namespace nestor
