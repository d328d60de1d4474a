// y = P x + B_r A_r x + bias for more than 16 rows: bound by FLOPs, 2 in (out) or 2 r (in + out) a
// row. A panel of 16 outputs is turned into floats 256 inputs at a time, stays in the first-level
// cache and meets a block of rows there; unpacking costs a few per cent of the product. Every core
// keeps to its rows from layer to layer, since activations that another core has just written
// travel slower than packed weights.
//
// Measured on Zen 4 (2 threads, 480 rows, MiniLM's six layers), against unpacking 256 outputs at a
// time for OpenBLAS' sgemm: 48 ms for 63 at full rank, 12 for 26 at a prefix of rank 64, where
// sgemm's packing of its input is repaid worst.

#include <algorithm>

#include "kernels/cpu/linear.h"

namespace nestor {
namespace {

// A block of fewer rows would pay more for unpacking the weights again than it gains.
constexpr int64_t kMinRowsPerBlock = 96;
constexpr int64_t kRowsPerTile = 6;  // of the kernel

int64_t RoundDown(int64_t value, int64_t multiple) { return value / multiple * multiple; }

// The rows of a group that lie in a block; begin >= end where there are none.
RowGroup PartOf(RowGroup group, const RowBlock& block) {
  group.begin = std::max(group.begin, block.begin);
  group.end = std::min(group.end, block.end);
  return group;
}

bool HasForm(std::span<const RowGroup> groups, Form form, const RowBlock& block) {
  return std::any_of(groups.begin(), groups.end(), [&](const RowGroup& group) {
    return group.form == form && group.begin < block.end && group.end > block.begin;
  });
}

// Whether the first row of the form lies in the block: of all the passes over a part, the one that
// is counted.
bool IsFirstWith(std::span<const RowGroup> groups, Form form, const RowBlock& block) {
  const auto first = std::find_if(groups.begin(), groups.end(),
                                  [&](const RowGroup& group) { return group.form == form; });
  return first != groups.end() && first->begin >= block.begin && first->begin < block.end;
}

int64_t NumPanels(int64_t size) { return (size + kPanelOutputs - 1) / kPanelOutputs; }

}  // namespace

void LinearRunner::RunManyRows(const LinearCall& call) {
  int64_t z_panels = 0;
  int64_t panels = 0;
  for (size_t i = 0; i < call.parts.size(); ++i) {
    z_panels += NumPanels(plans_[i].residual.max_rank) + NumPanels(plans_[i].prefix.max_rank);
    panels += NumPanels(plans_[i].layer->out);
  }
  const int64_t num_blocks =
      std::clamp<int64_t>(call.rows / kMinRowsPerBlock, 1, pool_->num_threads());
  const auto block_of = [&](int64_t index) {
    return RowBlock{.begin = RoundDown(call.rows * index / num_blocks, kRowsPerTile),
                    .end = index + 1 == num_blocks
                               ? call.rows
                               : RoundDown(call.rows * (index + 1) / num_blocks, kRowsPerTile)};
  };
  // Tasks are ordered by blocks, so that a thread's share of them is its rows.
  pool_->Run(z_panels * num_blocks, [&](int64_t task, int thread) {
    const RowBlock block = block_of(task / z_panels);
    int64_t panel = task % z_panels;
    for (size_t i = 0; i < call.parts.size(); ++i) {
      for (const FactorStage* stage : {&plans_[i].residual, &plans_[i].prefix}) {
        const int64_t count = NumPanels(stage->max_rank);
        if (panel >= 0 && panel < count)
          MultiplyByA(call, plans_[i], *stage, panel * kPanelOutputs, block, thread);
        panel -= count;
      }
    }
  });
  pool_->Run(panels * num_blocks, [&](int64_t task, int thread) {
    const RowBlock block = block_of(task / panels);
    int64_t panel = task % panels;
    for (size_t i = 0; i < call.parts.size(); ++i) {
      const int64_t count = NumPanels(plans_[i].layer->out);
      if (panel >= 0 && panel < count) RunPanel(call, plans_[i], panel, block, thread);
      panel -= count;
    }
  });
}

void LinearRunner::MultiplyByA(const LinearCall& call, const PartPlan& plan,
                               const FactorStage& stage, int64_t first, RowBlock block,
                               int thread) {
  const PackedLinear& layer = *plan.layer;
  const std::span<const RowGroup> groups = plan.part->groups;
  if (!HasForm(groups, stage.form, block)) return;
  const int64_t components = std::min(kPanelOutputs, stage.max_rank - first);
  ThreadState& state = threads_[thread];
  for (int64_t begin = 0; begin < layer.in; begin += kDepthBlock) {
    const int64_t end = std::min(layer.in, begin + kDepthBlock);
    kernels_->panel_from_a(stage.factors->a + first * PaddedToGroup(layer.in) + begin,
                           PaddedToGroup(layer.in),
                           stage.factors->a_scales + first * layer.groups() + begin / kGroupSize,
                           layer.groups(), components, NumGroups(end - begin), state.panel);
    for (const RowGroup& group : groups) {
      const RowGroup rows = PartOf(group, block);
      if (rows.form != stage.form || rows.rank <= first || rows.begin >= rows.end) continue;
      const int64_t count = std::min(components, rows.rank - first);
      kernels_->gemm(InputRow(call, rows.begin) + begin, layer.in, rows.end - rows.begin,
                     end - begin, state.panel, nullptr,
                     z_.data() + stage.z_offset + rows.begin * stage.z_stride + first,
                     stage.z_stride, count, begin > 0);
      state.executed.flops += 2 * (rows.end - rows.begin) * count * (end - begin);
    }
  }
  if (IsFirstWith(groups, stage.form, block))
    state.executed.weight_bytes += components * layer.a_component_bytes();
}

void LinearRunner::RunPanel(const LinearCall& call, const PartPlan& plan, int64_t panel,
                            RowBlock block, int thread) {
  SetToBias(call, plan, panel, block, thread);
  for (const Form form : {Form::kResidual, Form::kDense}) {
    if (HasForm(plan.part->groups, form, block))
      MultiplyByWeights(call, plan, form, panel, block, thread);
  }
  for (const FactorStage* stage : {&plan.residual, &plan.prefix}) {
    if (HasForm(plan.part->groups, stage->form, block))
      MultiplyByB(call, plan, *stage, panel, block, thread);
  }
}

void LinearRunner::SetToBias(const LinearCall& call, const PartPlan& plan, int64_t panel,
                             RowBlock block, int thread) {
  const int64_t first = panel * kPanelOutputs;
  const int64_t outputs = std::min(kPanelOutputs, plan.layer->out - first);
  const float* bias = plan.layer->bias;
  for (const RowGroup& group : plan.part->groups) {
    if (group.form != Form::kPrefix || group.rank > 0) continue;
    const RowGroup rows = PartOf(group, block);
    for (int64_t t = rows.begin; t < rows.end; ++t) {
      float* out = OutputRow(*plan.part, t) + first;
      for (int64_t o = 0; o < outputs; ++o)
        out[o] = (call.add_to_output ? out[o] : 0.0f) + (bias == nullptr ? 0.0f : bias[first + o]);
    }
  }
  if (bias != nullptr && block.begin == 0) threads_[thread].executed.weight_bytes += 4 * outputs;
}

void LinearRunner::UnpackWeights(const PackedLinear& layer, Form form, int64_t panel, int64_t begin,
                                 int64_t end, float* out) const {
  const int64_t group = begin / kGroupSize;
  const bool is_dense = form == Form::kDense;
  if (is_dense && layer.dense_bf16 != nullptr) {
    kernels_->panel_from_bf16(layer.Bf16Panel(panel) + begin * kPanelOutputs, end - begin, out);
  } else if (is_dense && layer.dense_f32 != nullptr) {
    const int64_t first = panel * kPanelOutputs;
    kernels_->panel_from_f32(layer.dense_f32 + first * layer.in + begin, layer.in,
                             std::min(kPanelOutputs, layer.out - first), end - begin, out);
  } else {
    kernels_->panel_from_planes(
        layer.CoarsePanel(panel) + group * kCoarseGroupBytes,
        is_dense ? layer.FinePanel(panel) + group * kFineGroupBytes : nullptr,
        NumGroups(end - begin), out);
  }
}

void LinearRunner::MultiplyByWeights(const LinearCall& call, const PartPlan& plan, Form form,
                                     int64_t panel, RowBlock block, int thread) {
  const PackedLinear& layer = *plan.layer;
  const std::span<const RowGroup> groups = plan.part->groups;
  const int64_t first = panel * kPanelOutputs;
  const int64_t outputs = std::min(kPanelOutputs, layer.out - first);
  ThreadState& state = threads_[thread];
  for (int64_t begin = 0; begin < layer.in; begin += kDepthBlock) {
    const int64_t end = std::min(layer.in, begin + kDepthBlock);
    const float* bias = begin == 0 && layer.bias != nullptr ? layer.bias + first : nullptr;
    UnpackWeights(layer, form, panel, begin, end, state.panel);
    for (const RowGroup& group : groups) {
      const RowGroup rows = PartOf(group, block);
      if (rows.form != form || rows.begin >= rows.end) continue;
      kernels_->gemm(InputRow(call, rows.begin) + begin, layer.in, rows.end - rows.begin,
                     end - begin, state.panel, bias, OutputRow(*plan.part, rows.begin) + first,
                     layer.out, outputs, call.add_to_output || begin > 0);
      state.executed.flops += 2 * (rows.end - rows.begin) * outputs * (end - begin);
    }
  }
  if (!IsFirstWith(groups, form, block)) return;
  const bool is_dense = form == Form::kDense;
  int64_t bytes = 0;
  if (is_dense && layer.fine == nullptr) bytes += layer.dense_output_bytes();
  if (is_dense && layer.fine != nullptr) bytes += layer.fine_output_bytes();
  // One pass over the coarse plane serves residual and dense rows.
  const bool reads_coarse = !is_dense || layer.fine != nullptr;
  const bool was_counted = is_dense && HasForm(groups, Form::kResidual, RowBlock{0, call.rows});
  if (reads_coarse && !was_counted) bytes += layer.coarse_output_bytes();
  state.executed.weight_bytes += outputs * bytes;
}

void LinearRunner::MultiplyByB(const LinearCall& call, const PartPlan& plan,
                               const FactorStage& stage, int64_t panel, RowBlock block,
                               int thread) {
  const PackedLinear& layer = *plan.layer;
  const std::span<const RowGroup> groups = plan.part->groups;
  const int64_t first = panel * kPanelOutputs;
  const int64_t outputs = std::min(kPanelOutputs, layer.out - first);
  const int64_t unit = first / kUnitOutputs;
  const bool is_prefix = stage.form == Form::kPrefix;
  ThreadState& state = threads_[thread];
  for (const BSegment& segment : stage.factors->SegmentsOf(stage.max_rank)) {
    for (int64_t skipped = 0; skipped < segment.size; skipped += kDepthBlock) {
      const int64_t begin = segment.begin + skipped;
      const int64_t end =
          std::min({stage.max_rank, segment.begin + segment.size, begin + kDepthBlock});
      if (begin >= end) break;
      // Residual rows have their bias, and an output to add to, from the coarse plane.
      const bool is_first = is_prefix && begin == 0;
      const float* bias = is_first && layer.bias != nullptr ? layer.bias + first : nullptr;
      kernels_->panel_from_b(segment.Panel(unit) + skipped * kUnitOutputs + first % kUnitOutputs,
                             segment.PanelScales(unit) + skipped, end - begin, state.panel);
      for (const RowGroup& group : groups) {
        const RowGroup rows = PartOf(group, block);
        if (rows.form != stage.form || rows.rank <= begin || rows.begin >= rows.end) continue;
        const int64_t depth = std::min(end, rows.rank) - begin;
        kernels_->gemm(z_.data() + stage.z_offset + rows.begin * stage.z_stride + begin,
                       stage.z_stride, rows.end - rows.begin, depth, state.panel, bias,
                       OutputRow(*plan.part, rows.begin) + first, layer.out, outputs,
                       call.add_to_output || !is_first);
        state.executed.flops += 2 * (rows.end - rows.begin) * outputs * depth;
      }
    }
  }
  // Counted once for the two panels that share the component's 32 outputs.
  if (first % kUnitOutputs == 0 && IsFirstWith(groups, stage.form, block))
    state.executed.weight_bytes += stage.max_rank * PackedLinear::kBComponentBytes;
}

}  // namespace nestor
