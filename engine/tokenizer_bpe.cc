#include <algorithm>
#include <queue>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "engine/tokenizer_model.h"
#include "engine/unicode.h"

namespace nestor {
namespace {

// What becomes of a pair of neighbouring tokens; the merge of the lowest rank goes first.
struct Merge {
  int32_t rank;
  int32_t merged_id;
};

class MergeTable {
 public:
  // The later of two entries for one pair counts.
  void Add(int32_t left, int32_t right, const Merge& merge) { merges_[Key(left, right)] = merge; }
  const Merge* Find(int32_t left, int32_t right) const {
    const auto found = merges_.find(Key(left, right));
    return found == merges_.end() ? nullptr : &found->second;
  }

 private:
  static uint64_t Key(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  absl::flat_hash_map<uint64_t, Merge> merges_;
};

// The tokens of one word as a doubly linked list, merged in place.
class WordMerger {
 public:
  explicit WordMerger(const MergeTable* merges) : merges_(merges) {}

  void Add(int32_t id) {
    const int32_t last = static_cast<int32_t>(symbols_.size()) - 1;
    if (last >= 0) symbols_[last].next = last + 1;
    symbols_.push_back({.id = id, .previous = last, .next = kNone});
  }

  void MergeAll() {
    for (size_t i = 0; i + 1 < symbols_.size(); ++i) Offer(static_cast<int32_t>(i));
    while (!candidates_.empty()) {
      const Candidate candidate = candidates_.top();
      candidates_.pop();
      if (IsCurrent(candidate)) Apply(candidate);
    }
  }

  void AppendTo(std::vector<int32_t>* ids) const {
    if (symbols_.empty()) return;
    for (int32_t i = 0; i != kNone; i = symbols_[i].next) ids->push_back(symbols_[i].id);
  }

 private:
  static constexpr int32_t kNone = -1;
  struct Symbol {
    int32_t id;  // kNone once merged into its left neighbour
    int32_t previous;
    int32_t next;
  };
  struct Candidate {
    int32_t rank;
    int32_t position;  // of the left token
    int32_t merged_id;
    // std::priority_queue gives the largest first.
    bool operator<(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };

  void Offer(int32_t position) {
    const int32_t next = symbols_[position].next;
    if (next == kNone) return;
    const Merge* merge = merges_->Find(symbols_[position].id, symbols_[next].id);
    if (merge != nullptr) candidates_.push({merge->rank, position, merge->merged_id});
  }

  // Whether the pair that the candidate was made for, or one that merges to the same, still stands.
  bool IsCurrent(const Candidate& candidate) const {
    const Symbol& left = symbols_[candidate.position];
    if (left.id == kNone || left.next == kNone) return false;
    const Merge* merge = merges_->Find(left.id, symbols_[left.next].id);
    return merge != nullptr && merge->merged_id == candidate.merged_id;
  }

  void Apply(const Candidate& candidate) {
    Symbol& left = symbols_[candidate.position];
    Symbol& right = symbols_[left.next];
    left.id = candidate.merged_id;
    left.next = right.next;
    if (right.next != kNone) symbols_[right.next].previous = candidate.position;
    right.id = kNone;
    if (left.previous != kNone) Offer(left.previous);
    Offer(candidate.position);
  }

  const MergeTable* const merges_;
  std::vector<Symbol> symbols_;
  std::priority_queue<Candidate> candidates_;
};

struct BpeOptions {
  std::string continuing_subword_prefix;
  std::string end_of_word_suffix;
  std::optional<int32_t> unknown_id;
  bool fuses_unknown;
  bool falls_back_to_bytes;
  bool ignores_merges;  // for words that are in the vocabulary whole
};

class BpeModel : public TokenizerModel {
 public:
  BpeModel(Vocabulary vocabulary, MergeTable merges, BpeOptions options)
      : vocabulary_(std::move(vocabulary)),
        merges_(std::move(merges)),
        options_(std::move(options)) {
    if (options_.falls_back_to_bytes) {
      for (int byte = 0; byte < 256; ++byte) {
        byte_ids_.push_back(vocabulary_.IdOf(absl::StrFormat("<0x%02X>", byte)));
      }
    }
  }

  void Tokenize(std::string_view word, std::vector<int32_t>* ids) const override {
    if (options_.ignores_merges) {
      const std::optional<int32_t> whole = vocabulary_.IdOf(word);
      if (whole.has_value()) {
        ids->push_back(*whole);
        return;
      }
    }
    WordMerger merger(&merges_);
    AddCharacters(word, &merger);
    merger.MergeAll();
    merger.AppendTo(ids);
  }

  const Vocabulary& vocabulary() const override { return vocabulary_; }

 private:
  void AddCharacters(std::string_view word, WordMerger* merger) const {
    // An unknown token waits here, for the next unknown character may fuse with it.
    bool has_pending_unknown = false;
    for (size_t i = 0; i < word.size();) {
      const size_t begin = i;
      NextCodePoint(word, &i);
      const std::string_view character = word.substr(begin, i - begin);
      const std::optional<int32_t> id = IdOfCharacter(character, begin == 0, i == word.size());
      if (id.has_value()) {
        if (has_pending_unknown) merger->Add(*options_.unknown_id);
        has_pending_unknown = false;
        merger->Add(*id);
      } else if (!AddBytes(character, merger) && options_.unknown_id.has_value()) {
        if (has_pending_unknown && !options_.fuses_unknown) merger->Add(*options_.unknown_id);
        has_pending_unknown = true;
      }
    }
    if (has_pending_unknown) merger->Add(*options_.unknown_id);
  }

  std::optional<int32_t> IdOfCharacter(std::string_view character, bool is_first,
                                       bool is_last) const {
    const bool has_prefix = !is_first && !options_.continuing_subword_prefix.empty();
    const bool has_suffix = is_last && !options_.end_of_word_suffix.empty();
    if (!has_prefix && !has_suffix) return vocabulary_.IdOf(character);
    std::string token = has_prefix ? options_.continuing_subword_prefix : std::string();
    token += character;
    if (has_suffix) token += options_.end_of_word_suffix;
    return vocabulary_.IdOf(token);
  }

  // False, and nothing added, where a byte has no token.
  bool AddBytes(std::string_view character, WordMerger* merger) const {
    if (!options_.falls_back_to_bytes) return false;
    for (const char byte : character) {
      if (!byte_ids_[static_cast<uint8_t>(byte)].has_value()) return false;
    }
    for (const char byte : character) merger->Add(*byte_ids_[static_cast<uint8_t>(byte)]);
    return true;
  }

  const Vocabulary vocabulary_;
  const MergeTable merges_;
  const BpeOptions options_;
  std::vector<std::optional<int32_t>> byte_ids_;  // [256] where bytes are a fallback
};

// "left right", or ["left", "right"].
absl::StatusOr<std::pair<std::string, std::string>> ParsePair(const JsonField& entry) {
  if (entry.value().is_string()) {
    NESTOR_ASSIGN_OR_RETURN(const std::string text, entry.AsString());
    const std::vector<std::string> parts = absl::StrSplit(text, ' ');
    if (parts.size() != 2) {
      return entry.Error(
          absl::StrCat("must be two tokens with a space between; was \"", text, "\""));
    }
    return std::pair(parts[0], parts[1]);
  }
  NESTOR_ASSIGN_OR_RETURN(const std::vector<JsonField> parts, entry.Entries());
  if (parts.size() != 2) return entry.Error(absl::StrCat("must be a pair; had ", parts.size()));
  NESTOR_ASSIGN_OR_RETURN(std::string left, parts[0].AsString());
  NESTOR_ASSIGN_OR_RETURN(std::string right, parts[1].AsString());
  return std::pair(std::move(left), std::move(right));
}

absl::StatusOr<MergeTable> ParseMerges(const JsonField& field, const Vocabulary& vocabulary,
                                       size_t prefix_size) {
  NESTOR_ASSIGN_OR_RETURN(const std::vector<JsonField> entries, field.Entries());
  MergeTable merges;
  int32_t rank = 0;
  for (const JsonField& entry : entries) {
    NESTOR_ASSIGN_OR_RETURN(const auto pair, ParsePair(entry));
    const auto& [left, right] = pair;
    if (right.size() < prefix_size) return entry.Error("lacks the continuing_subword_prefix");
    const std::string merged = left + right.substr(prefix_size);
    for (const std::string* token : {&left, &right, &merged}) {
      if (!vocabulary.IdOf(*token).has_value()) {
        return entry.Error(absl::StrCat("\"", *token, "\" is not in model.vocab"));
      }
    }
    merges.Add(*vocabulary.IdOf(left), *vocabulary.IdOf(right),
               {.rank = rank++, .merged_id = *vocabulary.IdOf(merged)});
  }
  return merges;
}

}  // namespace

absl::StatusOr<std::unique_ptr<TokenizerModel>> ParseBpeModel(const JsonField& field) {
  const JsonField dropout = field.Member("dropout");
  if (!dropout.is_null() && dropout.value() != 0.0) {
    return dropout.Error("random merging is not supported");
  }
  NESTOR_ASSIGN_OR_RETURN(Vocabulary vocabulary, Vocabulary::Parse(field.Member("vocab")));
  BpeOptions options;
  NESTOR_ASSIGN_OR_RETURN(options.continuing_subword_prefix,
                          field.GetString("continuing_subword_prefix", ""));
  NESTOR_ASSIGN_OR_RETURN(options.end_of_word_suffix, field.GetString("end_of_word_suffix", ""));
  NESTOR_ASSIGN_OR_RETURN(options.fuses_unknown, field.GetBool("fuse_unk", false));
  NESTOR_ASSIGN_OR_RETURN(options.falls_back_to_bytes, field.GetBool("byte_fallback", false));
  NESTOR_ASSIGN_OR_RETURN(options.ignores_merges, field.GetBool("ignore_merges", false));
  const JsonField unknown = field.Member("unk_token");
  if (!unknown.is_null()) {
    NESTOR_ASSIGN_OR_RETURN(const std::string token, unknown.AsString());
    options.unknown_id = vocabulary.IdOf(token);
    if (!options.unknown_id.has_value()) {
      return unknown.Error(absl::StrCat("\"", token, "\" is not in model.vocab"));
    }
  }
  NESTOR_ASSIGN_OR_RETURN(MergeTable merges, ParseMerges(field.Member("merges"), vocabulary,
                                                         options.continuing_subword_prefix.size()));
  return std::make_unique<BpeModel>(std::move(vocabulary), std::move(merges), std::move(options));
}

}  // namespace nestor
