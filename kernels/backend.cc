#include "kernels/backend.h"

#include "kernels/call_checks.h"

namespace nestor {

void Backend::Mlp(const MlpCall& call) {
  CheckMlpCall(call);
  Linear(call.expand);
  const std::span<const LinearPart> parts = call.expand.parts;
  Activation({.kind = call.activation,
              .in = parts[0].out,
              .up = parts.size() > 1 ? parts[1].out : Tensor{},
              .out = call.contract.in,
              .rows = call.expand.rows});
  Linear(call.contract);
}

StepCosts Backend::step_costs(int64_t /*rows*/) const { return {}; }

}  // namespace nestor
