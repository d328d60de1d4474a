#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "engine/normalizer.h"
#include "engine/tokenizer_json.h"

namespace nestor {

// A token that is recognised in the text itself, before the model sees it.
struct AddedToken {
  int32_t id;
  std::string content;         // also what it decodes to, not normalised
  bool is_special;             // left out of decoded text where asked
  bool is_single_word;         // only where no word character touches it
  bool strips_left;            // takes the spaces before it
  bool strips_right;           // takes the spaces after it
  bool is_in_normalized_text;  // searched for after normalisation
};

// A part of a text: an added token, or text between them.
struct AddedTokenSection {
  size_t begin;
  size_t end;
  std::optional<int32_t> id;  // of the added token
};

// The added tokens of a tokenizer.json.
//
// Immutable, so safe to share between threads.
class AddedTokens {
 public:
  // `field` is the list `added_tokens`; null stands for none. `normalizer` may be null.
  static absl::StatusOr<AddedTokens> Parse(const JsonField& field,
                                           const TextNormalizer* normalizer);

  const std::vector<AddedToken>& tokens() const { return tokens_; }
  // Cuts `text` at the tokens that are searched for in raw or in normalised text: at each place the
  // longest token, from left to right. Sections are not empty.
  std::vector<AddedTokenSection> Find(std::string_view text, bool is_normalized) const;

 private:
  // A trie over bytes; node 0 is the root.
  struct Trie {
    struct Node {
      absl::flat_hash_map<char, int32_t> children;
      int32_t token = -1;  // index into tokens_ of the token that ends here
    };
    std::vector<Node> nodes = std::vector<Node>(1);
  };
  struct Match {
    int32_t token;
    size_t end;
  };

  static void Insert(const std::string& content, int32_t token, Trie* trie);
  static std::optional<Match> LongestAt(const Trie& trie, std::string_view text, size_t begin);

  std::vector<AddedToken> tokens_;
  Trie raw_;
  Trie normalized_;
};

}  // namespace nestor
