#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/tokenizer_model.h"
#include "engine/unicode.h"

namespace nestor {
namespace {

class WordPieceModel : public TokenizerModel {
 public:
  struct Options {
    std::string continuing_prefix;
    size_t max_characters_per_word;
    int32_t unknown_id;
  };
  WordPieceModel(Vocabulary vocabulary, Options options)
      : vocabulary_(std::move(vocabulary)), options_(std::move(options)) {}

  void Tokenize(std::string_view word, std::vector<int32_t>* ids) const override {
    if (CountCodePoints(word) > options_.max_characters_per_word) {
      ids->push_back(options_.unknown_id);
      return;
    }
    const size_t num_before = ids->size();
    for (size_t begin = 0; begin < word.size();) {
      const std::optional<Piece> piece = LongestPieceAt(word, begin);
      if (!piece.has_value()) {
        // One part that is unknown makes the word unknown.
        ids->resize(num_before);
        ids->push_back(options_.unknown_id);
        return;
      }
      ids->push_back(piece->id);
      begin = piece->end;
    }
  }

  const Vocabulary& vocabulary() const override { return vocabulary_; }

 private:
  struct Piece {
    int32_t id;
    size_t end;
  };

  std::optional<Piece> LongestPieceAt(std::string_view word, size_t begin) const {
    std::string candidate = begin > 0 ? options_.continuing_prefix : std::string();
    const size_t prefix_size = candidate.size();
    candidate += word.substr(begin);
    while (candidate.size() > prefix_size) {
      const std::optional<int32_t> id = vocabulary_.IdOf(candidate);
      if (id.has_value()) return Piece{*id, begin + candidate.size() - prefix_size};
      // Drops the last character, whose bytes other than the first are 0b10xxxxxx.
      while ((candidate.back() & 0xc0) == 0x80) candidate.pop_back();
      candidate.pop_back();
    }
    return std::nullopt;
  }

  const Vocabulary vocabulary_;
  const Options options_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<TokenizerModel>> ParseWordPieceModel(const JsonField& field) {
  NESTOR_ASSIGN_OR_RETURN(Vocabulary vocabulary, Vocabulary::Parse(field.Member("vocab")));
  WordPieceModel::Options options;
  NESTOR_ASSIGN_OR_RETURN(options.continuing_prefix,
                          field.GetString("continuing_subword_prefix", "##"));
  NESTOR_ASSIGN_OR_RETURN(const int64_t max_characters,
                          field.GetInt("max_input_chars_per_word", 100));
  if (max_characters < 1) {
    return field.Member("max_input_chars_per_word")
        .Error(absl::StrCat("must be positive; was ", max_characters));
  }
  options.max_characters_per_word = static_cast<size_t>(max_characters);
  NESTOR_ASSIGN_OR_RETURN(const std::string unknown, field.GetString("unk_token", "[UNK]"));
  const std::optional<int32_t> unknown_id = vocabulary.IdOf(unknown);
  if (!unknown_id.has_value()) {
    return field.Member("unk_token").Error(absl::StrCat("\"", unknown, "\" is not in model.vocab"));
  }
  options.unknown_id = *unknown_id;
  return std::make_unique<WordPieceModel>(std::move(vocabulary), std::move(options));
}

}  // namespace nestor
