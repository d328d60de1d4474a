#include "engine/tokenizer.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/normalizer.h"
#include "engine/pre_tokenizer.h"
#include "engine/tokenizer_added_tokens.h"
#include "engine/tokenizer_decoder.h"
#include "engine/tokenizer_json.h"
#include "engine/tokenizer_model.h"
#include "engine/tokenizer_post_processor.h"
#include "engine/unicode.h"

namespace nestor {
struct Tokenizer::State {
  std::unique_ptr<TextNormalizer> normalizer;   // may be null
  std::unique_ptr<PreTokenizer> pre_tokenizer;  // may be null
  std::unique_ptr<TokenizerModel> model;
  SpecialTokenFrame frame;
  TokenDecoder decoder;
  AddedTokens added;
  absl::flat_hash_map<std::string, int32_t> added_ids;
  // By id, added tokens included; an empty one is an id that stands for nothing.
  std::vector<std::string> tokens;
  std::vector<bool> is_special;

  static absl::StatusOr<std::unique_ptr<State>> Parse(const JsonField& root);
  void CollectTokens();
  // Appends the ids of text that holds no added token.
  absl::Status EncodePiece(TextPiece piece, std::vector<int32_t>* ids) const;
  // Appends the ids of text that holds no added token of those searched for in raw text.
  absl::Status EncodeRawSection(TextPiece piece, std::vector<int32_t>* ids) const;
  absl::Status EncodeText(const std::string& text, std::vector<int32_t>* ids) const;
  // The token to decode; nullopt where `skips_special_tokens` and it is one.
  std::optional<std::string_view> TokenToDecode(int32_t id, bool skips_special_tokens) const;
};

absl::StatusOr<std::unique_ptr<Tokenizer::State>> Tokenizer::State::Parse(const JsonField& root) {
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<TextNormalizer> normalizer,
                          ParseNormalizer(root.Member("normalizer")));
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<PreTokenizer> pre_tokenizer,
                          ParsePreTokenizer(root.Member("pre_tokenizer")));
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<TokenizerModel> model,
                          ParseTokenizerModel(root.Member("model")));
  NESTOR_ASSIGN_OR_RETURN(SpecialTokenFrame frame,
                          ParsePostProcessor(root.Member("post_processor")));
  NESTOR_ASSIGN_OR_RETURN(TokenDecoder decoder, TokenDecoder::Parse(root.Member("decoder")));
  NESTOR_ASSIGN_OR_RETURN(AddedTokens added,
                          AddedTokens::Parse(root.Member("added_tokens"), normalizer.get()));
  auto state = std::make_unique<State>(State{.normalizer = std::move(normalizer),
                                             .pre_tokenizer = std::move(pre_tokenizer),
                                             .model = std::move(model),
                                             .frame = std::move(frame),
                                             .decoder = std::move(decoder),
                                             .added = std::move(added),
                                             .added_ids = {},
                                             .tokens = {},
                                             .is_special = {}});
  state->CollectTokens();
  return state;
}

void Tokenizer::State::CollectTokens() {
  tokens = model->vocabulary().tokens();
  is_special.resize(tokens.size());
  for (const AddedToken& token : added.tokens()) {
    const size_t index = static_cast<size_t>(token.id);
    if (index >= tokens.size()) {
      tokens.resize(index + 1);
      is_special.resize(index + 1);
    }
    tokens[index] = token.content;
    is_special[index] = token.is_special;
    added_ids[token.content] = token.id;
  }
}

absl::Status Tokenizer::State::EncodePiece(TextPiece piece, std::vector<int32_t>* ids) const {
  std::vector<TextPiece> words;
  words.push_back(std::move(piece));
  if (pre_tokenizer != nullptr) NESTOR_RETURN_IF_ERROR(pre_tokenizer->Split(&words));
  for (const TextPiece& word : words) model->Tokenize(word.text, ids);
  return absl::OkStatus();
}

absl::Status Tokenizer::State::EncodeRawSection(TextPiece piece, std::vector<int32_t>* ids) const {
  if (normalizer != nullptr) NESTOR_RETURN_IF_ERROR(normalizer->Normalize(&piece.text));
  for (const AddedTokenSection& section : added.Find(piece.text, /*is_normalized=*/true)) {
    if (section.id.has_value()) {
      ids->push_back(*section.id);
      continue;
    }
    NESTOR_RETURN_IF_ERROR(
        EncodePiece({.text = piece.text.substr(section.begin, section.end - section.begin),
                     .starts_input = piece.starts_input && section.begin == 0},
                    ids));
  }
  return absl::OkStatus();
}

absl::Status Tokenizer::State::EncodeText(const std::string& text,
                                          std::vector<int32_t>* ids) const {
  for (const AddedTokenSection& section : added.Find(text, /*is_normalized=*/false)) {
    if (section.id.has_value()) {
      ids->push_back(*section.id);
      continue;
    }
    NESTOR_RETURN_IF_ERROR(
        EncodeRawSection({.text = text.substr(section.begin, section.end - section.begin),
                          .starts_input = section.begin == 0},
                         ids));
  }
  return absl::OkStatus();
}

std::optional<std::string_view> Tokenizer::State::TokenToDecode(int32_t id,
                                                                bool skips_special_tokens) const {
  const size_t index = static_cast<size_t>(id);
  if (id < 0 || index >= tokens.size() || tokens[index].empty()) return "\uFFFD";
  if (skips_special_tokens && is_special[index]) return std::nullopt;
  return tokens[index];
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& path) {
  NESTOR_ASSIGN_OR_RETURN(const nlohmann::json json, ReadJsonFile(path));
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<State> state,
                          State::Parse(JsonField(&json, absl::StrCat(path, ": "))));
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(state)));
}

Tokenizer::Tokenizer(std::unique_ptr<State> state) : state_(std::move(state)) {}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(const std::string& text,
                                                       bool adds_special_tokens) const {
  if (!IsValidUtf8(text)) return absl::InvalidArgumentError("text: must be valid UTF-8");
  std::vector<int32_t> ids;
  if (adds_special_tokens) ids = state_->frame.before;
  NESTOR_RETURN_IF_ERROR(state_->EncodeText(text, &ids));
  if (adds_special_tokens) {
    ids.insert(ids.end(), state_->frame.after.begin(), state_->frame.after.end());
  }
  return ids;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skips_special_tokens) const {
  const std::unique_ptr<DecoderRun> run = state_->decoder.Start();
  std::string text;
  for (const int32_t id : ids) {
    const auto token = state_->TokenToDecode(id, skips_special_tokens);
    if (token.has_value()) run->Push(*token, &text);
  }
  run->Finish(&text);
  return text;
}

int32_t Tokenizer::size() const { return static_cast<int32_t>(state_->tokens.size()); }

std::optional<int32_t> Tokenizer::IdOf(std::string_view token) const {
  const auto added = state_->added_ids.find(absl::string_view(token.data(), token.size()));
  if (added != state_->added_ids.end()) return added->second;
  return state_->model->vocabulary().IdOf(token);
}

bool Tokenizer::IsSpecial(int32_t id) const {
  return id >= 0 && id < size() && state_->is_special[static_cast<size_t>(id)];
}

StreamingDecoder::StreamingDecoder(const Tokenizer* tokenizer)
    : tokenizer_(tokenizer), run_(tokenizer->state_->decoder.Start()) {}
StreamingDecoder::StreamingDecoder(StreamingDecoder&& other) noexcept = default;
StreamingDecoder& StreamingDecoder::operator=(StreamingDecoder&& other) noexcept = default;
StreamingDecoder::~StreamingDecoder() = default;

std::string StreamingDecoder::Push(int32_t id) {
  std::string text;
  const auto token = tokenizer_->state_->TokenToDecode(id, /*skips_special_tokens=*/true);
  if (token.has_value()) run_->Push(*token, &text);
  return text;
}

std::string StreamingDecoder::Flush() {
  std::string text;
  run_->Finish(&text);
  run_ = tokenizer_->state_->decoder.Start();
  return text;
}

}  // namespace nestor
