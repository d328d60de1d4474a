#include "engine/tokenizer_added_tokens.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/unicode.h"

namespace nestor {
namespace {

constexpr int64_t kMaxTokenId = 1 << 24;  // as in the model's vocabulary

absl::StatusOr<AddedToken> ParseToken(const JsonField& entry) {
  AddedToken token;
  NESTOR_ASSIGN_OR_RETURN(const int64_t id, entry.Member("id").AsInt());
  if (id < 0 || id > kMaxTokenId) {
    return entry.Member("id").Error(absl::StrCat("out of range; was ", id));
  }
  token.id = static_cast<int32_t>(id);
  NESTOR_ASSIGN_OR_RETURN(token.content, entry.GetString("content"));
  NESTOR_ASSIGN_OR_RETURN(token.is_special, entry.GetBool("special", false));
  NESTOR_ASSIGN_OR_RETURN(token.is_single_word, entry.GetBool("single_word", false));
  NESTOR_ASSIGN_OR_RETURN(token.strips_left, entry.GetBool("lstrip", false));
  NESTOR_ASSIGN_OR_RETURN(token.strips_right, entry.GetBool("rstrip", false));
  NESTOR_ASSIGN_OR_RETURN(token.is_in_normalized_text,
                          entry.GetBool("normalized", !token.is_special));
  return token;
}

// Start of the last character of `text`, which is not empty.
size_t LastCharacter(std::string_view text) {
  size_t begin = text.size() - 1;
  while ((text[begin] & 0xc0) == 0x80) --begin;
  return begin;
}

bool EndsWithWord(std::string_view text) {
  if (text.empty()) return false;
  size_t position = LastCharacter(text);
  return IsWordCharacter(NextCodePoint(text, &position));
}

bool StartsWithWord(std::string_view text) {
  size_t position = 0;
  return !text.empty() && IsWordCharacter(NextCodePoint(text, &position));
}

size_t SizeWithoutTrailingSpace(std::string_view text) {
  while (!text.empty()) {
    const size_t begin = LastCharacter(text);
    size_t position = begin;
    if (!IsWhitespace(NextCodePoint(text, &position))) break;
    text.remove_suffix(text.size() - begin);
  }
  return text.size();
}

size_t SizeOfLeadingSpace(std::string_view text) {
  size_t end = 0;
  while (end < text.size()) {
    size_t position = end;
    if (!IsWhitespace(NextCodePoint(text, &position))) break;
    end = position;
  }
  return end;
}

}  // namespace

absl::StatusOr<AddedTokens> AddedTokens::Parse(const JsonField& field,
                                               const TextNormalizer* normalizer) {
  AddedTokens added;
  if (field.is_null()) return added;
  NESTOR_ASSIGN_OR_RETURN(const std::vector<JsonField> entries, field.Entries());
  for (const JsonField& entry : entries) {
    NESTOR_ASSIGN_OR_RETURN(AddedToken token, ParseToken(entry));
    if (token.content.empty()) continue;
    const int32_t index = static_cast<int32_t>(added.tokens_.size());
    if (token.is_in_normalized_text) {
      std::string content = token.content;
      if (normalizer != nullptr) NESTOR_RETURN_IF_ERROR(normalizer->Normalize(&content));
      Insert(content, index, &added.normalized_);
    } else {
      Insert(token.content, index, &added.raw_);
    }
    added.tokens_.push_back(std::move(token));
  }
  return added;
}

void AddedTokens::Insert(const std::string& content, int32_t token, Trie* trie) {
  if (content.empty()) return;
  int32_t node = 0;
  for (const char byte : content) {
    const int32_t next_free = static_cast<int32_t>(trie->nodes.size());
    const auto [child, is_new] = trie->nodes[node].children.try_emplace(byte, next_free);
    node = child->second;
    if (is_new) trie->nodes.emplace_back();
  }
  trie->nodes[node].token = token;
}

std::optional<AddedTokens::Match> AddedTokens::LongestAt(const Trie& trie, std::string_view text,
                                                         size_t begin) {
  std::optional<Match> longest;
  int32_t node = 0;
  for (size_t i = begin; i < text.size(); ++i) {
    const auto child = trie.nodes[node].children.find(text[i]);
    if (child == trie.nodes[node].children.end()) break;
    node = child->second;
    if (trie.nodes[node].token >= 0) longest = Match{trie.nodes[node].token, i + 1};
  }
  return longest;
}

std::vector<AddedTokenSection> AddedTokens::Find(std::string_view text, bool is_normalized) const {
  const Trie& trie = is_normalized ? normalized_ : raw_;
  std::vector<AddedTokenSection> sections;
  size_t covered = 0;  // end of the last section
  for (size_t i = 0; i < text.size();) {
    const std::optional<Match> match = LongestAt(trie, text, i);
    if (!match.has_value()) {
      ++i;
      continue;
    }
    const AddedToken& token = tokens_[match->token];
    size_t begin = i;
    size_t end = match->end;
    i = match->end;
    if (token.is_single_word &&
        (EndsWithWord(text.substr(0, begin)) || StartsWithWord(text.substr(end)))) {
      continue;
    }
    if (token.strips_left) begin = SizeWithoutTrailingSpace(text.substr(0, begin));
    if (token.strips_right) end += SizeOfLeadingSpace(text.substr(end));
    // The token before may have taken this one's spaces.
    begin = std::max(begin, covered);
    if (covered < begin) sections.push_back({covered, begin, std::nullopt});
    sections.push_back({begin, end, token.id});
    covered = end;
  }
  if (covered < text.size()) sections.push_back({covered, text.size(), std::nullopt});
  return sections;
}

}  // namespace nestor
