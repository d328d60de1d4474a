#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace nestor {

struct ChatTurn {
  std::string role;
  std::string content;
};

// A checkpoint's chat template: the Jinja subset that the templates of Llama, Qwen, Mistral and
// ChatML models use. Immutable after parsing, so safe to share between threads.
class ChatTemplate {
 public:
  // Reads `chat_template` (a string or a list with an entry named "default") and the bos and eos
  // tokens from DIRECTORY/tokenizer_config.json; the file DIRECTORY/chat_template.jinja, where
  // there is one, goes before that entry. NOT_FOUND where the checkpoint has no template;
  // INVALID_ARGUMENT names file, line and construct of what is malformed or not supported.
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> Load(const std::string& directory);
  // From the template's text. Filters, tests and functions that are not supported are errors of
  // Render, since templates have branches that plain conversations never enter.
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> Parse(const std::string& source,
                                                             const std::string& bos_token,
                                                             const std::string& eos_token);
  ~ChatTemplate();

  // The prompt of a conversation, ending in the header of the assistant's turn where
  // `adds_generation_prompt`. INVALID_ARGUMENT carries what the template itself raised;
  // RESOURCE_EXHAUSTED where it prints, computes or recurses too much.
  absl::StatusOr<std::string> Render(const std::vector<ChatTurn>& turns,
                                     bool adds_generation_prompt) const;

 private:
  struct State;
  explicit ChatTemplate(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace nestor
