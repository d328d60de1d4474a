#pragma once

#include "absl/status/status.h"
#include "engine/engine.h"
#include "server/scheduler/cost_model.h"
#include "server/served_model.h"

namespace nestor {

// Runs every level at several row counts, so that memory is touched and the first request meets a
// warm machine: decoding with 1, 4 and 16 sequences and a prompt chunk of `prefill_chunk` tokens
// (encoders: 1, 4 and 16 texts of 32 tokens). Adds each time to `cost_model` and fills in the
// `tokens_per_second` of `model`'s levels. Leaves no sequence behind. The engine's error, if a
// step fails.
absl::Status WarmUp(int64_t prefill_chunk, Engine* engine, ServedModel* model,
                    CostModel* cost_model);

}  // namespace nestor
