// y = P x + B_r A_r x + bias for more than 16 rows, or for any number through layers whose
// activations are floats: bound by FLOPs, 2 in (out) or 2 r (in + out) a row. A panel of 16
// outputs is unpacked some hundred inputs at a time, stays in the first-level cache and meets a
// block of rows there; unpacking costs a few per cent of the product of many. Every core keeps to
// its rows from layer to layer, since activations that another core has just written travel slower
// than packed weights.
//
// A core of Zen 4 does 3.6 G products of 64 bytes, of 32 bf16 pairs or of 16 floats a second
// (measured). A group of 32 inputs and 16 outputs takes 11 instructions for a row in int8 (8
// products, one conversion, two for the scales), 16 in bf16 and 32 in fp32. So planes, A and B run
// in int8. The stored scales of B lie along its outputs. So z = A x is multiplied by the largest of
// each component before it is rounded to int8, and the codes of B by what is left, a factor of at
// most 1, and rounded once more.

#include <algorithm>
#include <utility>

#include "base/bfloat16.h"
#include "kernels/call_checks.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/middle_plane.h"

namespace nestor {
namespace {

// A block of fewer rows would pay more for unpacking the weights again than it gains.
constexpr int64_t kMinRowsPerBlock = 96;
// Converting some 10 us of input is worth waking the pool for.
constexpr int64_t kElementsPerTask = 16384;
constexpr int64_t kRowsPerTile = 12;  // of the kernels

int64_t RoundDown(int64_t value, int64_t multiple) { return value / multiple * multiple; }

// The rows of a group that lie in a block; begin >= end where there are none.
RowGroup PartOf(RowGroup group, const RowBlock& block) {
  group.begin = std::max(group.begin, block.begin);
  group.end = std::min(group.end, block.end);
  return group;
}

// Groups that a predicate holds for: those of a form, or of a stage.
auto OfForm(Form form) {
  return [form](const RowGroup& group) { return group.form == form; };
}

template <typename Stage>
auto OfStage(const Stage& stage) {
  return [&stage](const RowGroup& group) { return stage.Runs(group); };
}

// Whether some row of such a group lies in the block.
template <typename Predicate>
bool Has(std::span<const RowGroup> groups, Predicate predicate, const RowBlock& block) {
  return std::any_of(groups.begin(), groups.end(), [&](const RowGroup& group) {
    return predicate(group) && group.begin < block.end && group.end > block.begin;
  });
}

// Whether the first such row lies in the block: of all the passes over a part, the one that is
// counted.
template <typename Predicate>
bool HasFirst(std::span<const RowGroup> groups, Predicate predicate, const RowBlock& block) {
  const auto first = std::find_if(groups.begin(), groups.end(), predicate);
  return first != groups.end() && first->begin >= block.begin && first->begin < block.end;
}

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int64_t NumPanels(int64_t size) { return (size + kPanelOutputs - 1) / kPanelOutputs; }

}  // namespace

void LinearRunner::ConvertInput(const LinearCall& call) {
  bool needs_bf16 = false;
  for (size_t i = 0; i < call.parts.size(); ++i) {
    for (const RowGroup& group : call.parts[i].groups) {
      needs_bf16 = needs_bf16 || (group.form == Form::kDense &&
                                  ArithmeticOf(*plans_[i].layer, group.form) == Arithmetic::kBf16);
    }
  }
  const bool needs_codes = kernels_->int8_gemm != nullptr && NeedsCodes(call);
  if (needs_codes) PrepareCodes(call);
  bf16_stride_ = RoundUp(call.in.cols, 16);
  if (needs_bf16) bf16_input_.GrowTo(call.rows * bf16_stride_);
  if (!needs_codes && !needs_bf16) return;
  const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / call.in.cols);
  pool_->RunRanges(call.rows, rows_per_task, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      if (needs_codes) QuantiseRow(call, t);
      if (needs_bf16)
        kernels_->bf16_round_row(InputRow(call, t), call.in.cols,
                                 bf16_input_.data() + t * bf16_stride_);
    }
  });
}

int64_t LinearRunner::NumBlocks(int64_t rows) const {
  return std::clamp<int64_t>(rows / kMinRowsPerBlock, 1, pool_->num_threads());
}

int64_t LinearRunner::LargestBlock(int64_t rows) const {
  return std::max(rows / NumBlocks(rows), std::min(rows, 2 * kMinRowsPerBlock)) + kRowsPerTile;
}

RowBlock LinearRunner::BlockAt(int64_t rows, int64_t index) const {
  const int64_t num_blocks = NumBlocks(rows);
  const auto begin_of = [&](int64_t i) {
    return i == num_blocks ? rows : RoundDown(rows * i / num_blocks, kRowsPerTile);
  };
  return {.begin = begin_of(index), .end = begin_of(index + 1)};
}

void LinearRunner::RunManyRows(const LinearCall& call) {
  ConvertInput(call);
  RunZ(call);
  RunAllPanels(call);
}

// Tasks are ordered by blocks, here and below, so that a thread's share of them is its rows.
void LinearRunner::RunZ(const LinearCall& call) {
  if (kernels_->int8_gemm != nullptr) z_codes_.GrowTo(z_size_);
  int64_t groups = 0;
  for (size_t i = 0; i < call.parts.size(); ++i)
    for (const FactorStage& stage : plans_[i].stages()) groups += NumGroups(stage.max_rank);
  pool_->Run(groups * NumBlocks(call.rows), [&](int64_t task, int thread) {
    const RowBlock block = BlockAt(call.rows, task / groups);
    int64_t group = task % groups;
    for (size_t i = 0; i < call.parts.size(); ++i) {
      for (const FactorStage& stage : std::as_const(plans_[i]).stages()) {
        const int64_t count = NumGroups(stage.max_rank);
        if (group >= 0 && group < count)
          RunGroupOfZ(call, plans_[i], stage, group * kGroupSize, block, thread);
        group -= count;
      }
    }
  });
}

void LinearRunner::RunAllPanels(const LinearCall& call) {
  int64_t panels = 0;
  bool has_gar = false;
  for (size_t i = 0; i < call.parts.size(); ++i) {
    panels += NumPanels(plans_[i].layer->out);
    for (const FactorStage& stage : plans_[i].stages()) has_gar = has_gar || stage.IsGar();
  }
  if (has_gar) {
    for (ThreadState& thread : threads_)
      thread.unordered.GrowTo(LargestBlock(call.rows) * kPanelOutputs);
  }
  pool_->Run(panels * NumBlocks(call.rows), [&](int64_t task, int thread) {
    const RowBlock block = BlockAt(call.rows, task / panels);
    int64_t panel = task % panels;
    for (size_t i = 0; i < call.parts.size(); ++i) {
      const int64_t count = NumPanels(plans_[i].layer->out);
      if (panel >= 0 && panel < count)
        RunPanel(call, plans_[i], panel, block, PanelOf(call.parts[i], panel), thread);
      panel -= count;
    }
  });
}

bool LinearRunner::RunsInCodes(const LinearCall& call, std::span<const PackedLinear> layers) const {
  for (const LinearPart& part : call.parts) {
    for (const RowGroup& group : part.groups) {
      if (ArithmeticOf(layers[part.layer], group.form) != Arithmetic::kInt8) return false;
    }
  }
  return true;
}

bool LinearRunner::RunMlp(const MlpCall& call, std::span<const PackedLinear> layers) {
  CheckMlpCall(call);
  const int64_t rows = call.expand.rows;
  // The columns of a gar pair lie all over the hidden rows.
  const bool has_gar =
      std::any_of(call.expand.parts.begin(), call.expand.parts.end(), [&](const LinearPart& part) {
        return Has(part.groups, OfForm(Form::kGar), {.begin = 0, .end = rows});
      });
  if (rows <= kMaxFewRows || has_gar || !RunsInCodes(call.expand, layers) ||
      !RunsInCodes(call.contract, layers)) {
    return false;
  }
  const int64_t num_blocks = NumBlocks(rows);
  const int64_t units = NumGroups(call.contract.in.cols);
  const int64_t hidden_stride = CodeStride(call.contract.in.cols);
  // Both, since they change places below.
  const int64_t max_stride = std::max(hidden_stride, CodeStride(call.expand.in.cols));
  input_codes_.GrowTo(rows * max_stride);
  hidden_codes_.GrowTo(rows * max_stride);
  for (ThreadState& thread : threads_) {
    thread.gate.GrowTo(LargestBlock(rows) * kUnitOutputs);
    thread.up.GrowTo(LargestBlock(rows) * kUnitOutputs);
  }
  PlanCall(call.expand, layers);
  ConvertInput(call.expand);
  RunZ(call.expand);
  pool_->Run(units * num_blocks, [&](int64_t task, int thread) {
    ExpandUnit(call, task % units, BlockAt(rows, task / units), thread);
  });
  std::swap(input_codes_, hidden_codes_);
  code_stride_ = hidden_stride;
  PlanCall(call.contract, layers);
  RunZ(call.contract);
  RunAllPanels(call.contract);
  return true;
}

void LinearRunner::ExpandUnit(const MlpCall& call, int64_t unit, RowBlock block, int thread) {
  ThreadState& state = threads_[thread];
  const int64_t rows = block.end - block.begin;
  const int64_t cols = call.contract.in.cols;
  const int64_t num_parts = static_cast<int64_t>(call.expand.parts.size());
  float* const results[2] = {num_parts == 1 ? state.up.data() : state.gate.data(), state.up.data()};
  for (int64_t i = 0; i < num_parts; ++i) {
    // Columns behind the last stay zeros.
    if (cols - unit * kUnitOutputs < kUnitOutputs)
      std::fill_n(results[i], rows * kUnitOutputs, 0.0f);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t panel = 2 * unit + half;
      if (panel * kPanelOutputs >= cols) break;
      RunPanel(call.expand, plans_[i], panel, block,
               {.data = results[i] + half * kPanelOutputs,
                .stride = kUnitOutputs,
                .first_row = block.begin},
               thread);
    }
  }
  ActivationKernel(*kernels_, call.activation)(results[0], num_parts == 1 ? nullptr : results[1],
                                               rows * kUnitOutputs, state.up.data());
  const int64_t stride = CodeStride(cols);
  const int64_t at = block.begin * stride + unit * kGroupSize;
  kernels_->quantise_groups(state.up.data(), kUnitOutputs, rows, hidden_codes_.codes.data() + at,
                            stride, hidden_codes_.scales.data() + at / kGroupSize,
                            hidden_codes_.offsets.data() + at / kGroupSize, stride / kGroupSize);
}

LinearRunner::Arithmetic LinearRunner::ArithmeticOfPlanes(const PackedLinear& layer) const {
  return kernels_->int8_gemm != nullptr && !layer.float_activations ? Arithmetic::kInt8
                                                                    : Arithmetic::kFp32;
}

LinearRunner::Arithmetic LinearRunner::ArithmeticOf(const PackedLinear& layer, Form form) const {
  if (form != Form::kDense || layer.fine != nullptr) return ArithmeticOfPlanes(layer);
  const bool in_bf16 =
      layer.dense_bf16 != nullptr && kernels_->bf16_gemm != nullptr && !layer.float_activations;
  return in_bf16 ? Arithmetic::kBf16 : Arithmetic::kFp32;
}

int64_t LinearRunner::DepthOfPanel(Arithmetic arithmetic) const {
  switch (arithmetic) {
    case Arithmetic::kFp32:
      return kPanelBytes / (4 * kPanelOutputs);
    case Arithmetic::kInt8:
      return kPanelBytes / kernels_->int8_group_bytes * kGroupSize;
    case Arithmetic::kBf16:
      return kPanelBytes / (2 * kPanelOutputs);
  }
  return 0;
}

void LinearRunner::MultiplyInput(const LinearCall& call, Arithmetic arithmetic, RowBlock rows,
                                 int64_t begin, int64_t end, const uint8_t* panel,
                                 const Product& product) const {
  const int64_t num_rows = rows.end - rows.begin;
  const auto& [bias, out, out_stride, outputs, adds] = product;
  switch (arithmetic) {
    case Arithmetic::kFp32:
      kernels_->gemm(InputRow(call, rows.begin) + begin, call.in.cols, num_rows, end - begin,
                     reinterpret_cast<const float*>(panel), bias, out, out_stride, outputs, adds);
      break;
    case Arithmetic::kInt8: {
      const QuantisedRows quantised =
          input_codes_.From(rows.begin * code_stride_ + begin, code_stride_);
      kernels_->int8_gemm(quantised, num_rows, NumGroups(end - begin), panel, bias, out, out_stride,
                          outputs, adds);
      break;
    }
    case Arithmetic::kBf16:
      kernels_->bf16_gemm(bf16_input_.data() + rows.begin * bf16_stride_ + begin, bf16_stride_,
                          num_rows, end - begin, reinterpret_cast<const uint16_t*>(panel), bias,
                          out, out_stride, outputs, adds);
      break;
  }
}

void LinearRunner::RunGroupOfZ(const LinearCall& call, const PartPlan& plan,
                               const FactorStage& stage, int64_t first, RowBlock block,
                               int thread) {
  const std::span<const RowGroup> groups = plan.part->groups;
  if (!Has(groups, OfStage(stage), block)) return;
  const int64_t end = std::min(first + kGroupSize, stage.max_rank);
  for (int64_t k = first; k < end; k += kPanelOutputs)
    MultiplyByA(call, plan, stage, k, block, thread);
  if (stage.IsGar()) {
    for (const RowGroup& group : groups) {
      const RowGroup rows = PartOf(group, block);
      for (int64_t t = rows.begin; t < rows.end && stage.Runs(rows); ++t)
        Scatter(call, plan, stage, t, first, end - first,
                z_.data() + stage.z_offset + t * stage.z_stride + first);
    }
    if (HasFirst(groups, OfStage(stage), block))
      threads_[thread].executed.weight_bytes += (end - first) * PackedLinear::kRowOrderBytes;
  }
  if (ArithmeticOfPlanes(*plan.layer) != Arithmetic::kInt8) return;
  float scales[kGroupSize];
  std::transform(stage.factors->largest_b_scales + first,
                 stage.factors->largest_b_scales + first + kGroupSize, scales, FloatFromBfloat16);
  for (const RowGroup& group : groups) {
    const RowGroup rows = PartOf(group, block);
    if (!stage.Runs(rows) || rows.rank <= first || rows.begin >= rows.end) continue;
    const int64_t at = stage.z_offset + rows.begin * stage.z_stride + first;
    const int64_t count = std::min(kGroupSize, rows.rank - first);
    for (int64_t t = 0; t < rows.end - rows.begin; ++t) {
      float* z = z_.data() + at + t * stage.z_stride;
      for (int64_t k = 0; k < count; ++k) z[k] *= scales[k];
      std::fill(z + count, z + kGroupSize, 0.0f);
    }
    kernels_->quantise_groups(
        z_.data() + at, stage.z_stride, rows.end - rows.begin, z_codes_.codes.data() + at,
        stage.z_stride, z_codes_.scales.data() + at / kGroupSize,
        z_codes_.offsets.data() + at / kGroupSize, stage.z_stride / kGroupSize);
  }
}

void LinearRunner::MultiplyByA(const LinearCall& call, const PartPlan& plan,
                               const FactorStage& stage, int64_t first, RowBlock block,
                               int thread) {
  const PackedLinear& layer = *plan.layer;
  const std::span<const RowGroup> groups = plan.part->groups;
  const int64_t components = std::min(kPanelOutputs, stage.max_rank - first);
  const Arithmetic arithmetic = ArithmeticOfPlanes(layer);
  const int64_t depth = DepthOfPanel(arithmetic);
  ThreadState& state = threads_[thread];
  for (int64_t begin = 0; begin < layer.in; begin += depth) {
    const int64_t end = std::min(layer.in, begin + depth);
    const int8_t* codes = stage.factors->a + first * PaddedToGroup(layer.in) + begin;
    const uint16_t* scales = stage.factors->a_scales + first * layer.groups() + begin / kGroupSize;
    if (arithmetic == Arithmetic::kInt8) {
      kernels_->int8_panel_from_a(codes, PaddedToGroup(layer.in), scales, layer.groups(),
                                  components, NumGroups(end - begin), state.panel);
    } else {
      kernels_->panel_from_a(codes, PaddedToGroup(layer.in), scales, layer.groups(), components,
                             NumGroups(end - begin), reinterpret_cast<float*>(state.panel));
    }
    for (const RowGroup& group : groups) {
      const RowGroup rows = PartOf(group, block);
      if (!stage.Runs(rows) || rows.rank <= first || rows.begin >= rows.end) continue;
      const int64_t count = std::min(components, rows.rank - first);
      const int64_t offset = stage.z_offset + rows.begin * stage.z_stride + first;
      MultiplyInput(call, arithmetic, {rows.begin, rows.end}, begin, end, state.panel,
                    {.out = z_.data() + offset,
                     .out_stride = stage.z_stride,
                     .outputs = count,
                     .adds = begin > 0});
      state.executed.flops += 2 * (rows.end - rows.begin) * count * (end - begin);
    }
  }
  if (HasFirst(groups, OfStage(stage), block))
    state.executed.weight_bytes += components * layer.a_component_bytes();
}

LinearRunner::Outputs LinearRunner::PanelOf(const LinearPart& part, int64_t panel) {
  return {.data = OutputRow(part, 0) + panel * kPanelOutputs, .stride = part.out.cols};
}

void LinearRunner::RunPanel(const LinearCall& call, const PartPlan& plan, int64_t panel,
                            RowBlock block, const Outputs& to, int thread) {
  SetToBias(call, plan, panel, block, to, thread);
  for (const Form form : {Form::kResidual, Form::kMiddle, Form::kDense}) {
    if (Has(plan.part->groups, OfForm(form), block))
      MultiplyByWeights(call, plan, form, panel, block, to, thread);
  }
  for (const FactorStage& stage : plan.stages()) {
    if (!Has(plan.part->groups, OfStage(stage), block)) continue;
    if (stage.IsGar()) {
      RunGarPanels(call, plan, stage, panel, block, thread);
    } else {
      MultiplyByB(call, plan, stage, panel, block, to, thread);
    }
  }
}

void LinearRunner::RunGarPanels(const LinearCall& call, const PartPlan& plan,
                                const FactorStage& stage, int64_t panel, RowBlock block,
                                int thread) {
  ThreadState& state = threads_[thread];
  const std::span<const RowGroup> groups = plan.part->groups;
  const int64_t panels = NumPanels(stage.outputs);
  const int64_t part_panels = NumPanels(plan.layer->out);
  const Outputs to = {
      .data = state.unordered.data(), .stride = kPanelOutputs, .first_row = block.begin};
  for (int64_t p = panels * panel / part_panels; p < panels * (panel + 1) / part_panels; ++p) {
    MultiplyByB(call, plan, stage, p, block, to, thread);
    const int64_t first = p * kPanelOutputs;
    const int64_t outputs = std::min(kPanelOutputs, stage.outputs - first);
    for (const RowGroup& group : groups) {
      const RowGroup rows = PartOf(group, block);
      for (int64_t t = rows.begin; t < rows.end && stage.Runs(rows); ++t)
        Scatter(call, plan, stage, t, stage.max_rank + first, outputs, to.Row(t));
    }
    if (HasFirst(groups, OfStage(stage), block))
      state.executed.weight_bytes += outputs * PackedLinear::kRowOrderBytes;
  }
}

void LinearRunner::SetToBias(const LinearCall& call, const PartPlan& plan, int64_t panel,
                             RowBlock block, const Outputs& to, int thread) {
  const int64_t first = panel * kPanelOutputs;
  const int64_t outputs = std::min(kPanelOutputs, plan.layer->out - first);
  const float* bias = plan.layer->bias;
  for (const RowGroup& group : plan.part->groups) {
    if (group.form != Form::kPrefix || group.rank > 0) continue;
    const RowGroup rows = PartOf(group, block);
    for (int64_t t = rows.begin; t < rows.end; ++t) {
      float* out = to.Row(t);
      for (int64_t o = 0; o < outputs; ++o)
        out[o] = (call.add_to_output ? out[o] : 0.0f) + (bias == nullptr ? 0.0f : bias[first + o]);
    }
  }
  if (bias != nullptr && block.begin == 0) threads_[thread].executed.weight_bytes += 4 * outputs;
}

void LinearRunner::UnpackWeights(const PackedLinear& layer, Form form, int64_t panel, int64_t begin,
                                 int64_t end, uint8_t* out) const {
  const Arithmetic arithmetic = ArithmeticOf(layer, form);
  auto* floats = reinterpret_cast<float*>(out);
  const bool is_dense = form == Form::kDense;
  if (is_dense && layer.dense_bf16 != nullptr) {
    const uint16_t* values = layer.Bf16Panel(panel) + begin * kPanelOutputs;
    if (arithmetic == Arithmetic::kBf16) {
      kernels_->bf16_panel_from_bf16(values, end - begin, reinterpret_cast<uint16_t*>(out));
    } else {
      kernels_->panel_from_bf16(values, end - begin, floats);
    }
  } else if (is_dense && layer.dense_f32 != nullptr) {
    const int64_t first = panel * kPanelOutputs;
    kernels_->panel_from_f32(layer.dense_f32 + first * layer.in + begin, layer.in,
                             std::min(kPanelOutputs, layer.out - first), end - begin, floats);
  } else {
    const int64_t group = begin / kGroupSize;
    const uint8_t* coarse = layer.CoarsePanel(panel) + group * kCoarseGroupBytes;
    const int64_t groups = NumGroups(end - begin);
    const uint8_t* fine = is_dense ? layer.FinePanel(panel) + group * kFineGroupBytes : nullptr;
    alignas(64) uint8_t scratch[kPanelBytes];
    if (form == Form::kMiddle) {
      kernels_->fine_from_middle(layer.MiddlePanel(panel) + group * kMiddleGroupBytes, groups,
                                 scratch);
      fine = scratch;
    }
    if (arithmetic == Arithmetic::kInt8) {
      kernels_->int8_panel_from_planes(coarse, fine, groups, out);
    } else {
      kernels_->panel_from_planes(coarse, fine, groups, floats);
    }
  }
}

void LinearRunner::MultiplyByWeights(const LinearCall& call, const PartPlan& plan, Form form,
                                     int64_t panel, RowBlock block, const Outputs& to, int thread) {
  const PackedLinear& layer = *plan.layer;
  const std::span<const RowGroup> groups = plan.part->groups;
  const int64_t first = panel * kPanelOutputs;
  const int64_t outputs = std::min(kPanelOutputs, layer.out - first);
  const Arithmetic arithmetic = ArithmeticOf(layer, form);
  const int64_t depth = DepthOfPanel(arithmetic);
  ThreadState& state = threads_[thread];
  for (int64_t begin = 0; begin < layer.in; begin += depth) {
    const int64_t end = std::min(layer.in, begin + depth);
    UnpackWeights(layer, form, panel, begin, end, state.panel);
    for (const RowGroup& group : groups) {
      const RowGroup rows = PartOf(group, block);
      if (rows.form != form || rows.begin >= rows.end) continue;
      MultiplyInput(call, arithmetic, {rows.begin, rows.end}, begin, end, state.panel,
                    {.bias = begin == 0 && layer.bias != nullptr ? layer.bias + first : nullptr,
                     .out = to.Row(rows.begin),
                     .out_stride = to.stride,
                     .outputs = outputs,
                     .adds = call.add_to_output || begin > 0});
      state.executed.flops += 2 * (rows.end - rows.begin) * outputs * (end - begin);
    }
  }
  if (!HasFirst(groups, OfForm(form), block)) return;
  const bool is_dense = form == Form::kDense;
  int64_t bytes = 0;
  if (is_dense && layer.fine == nullptr) bytes += layer.dense_output_bytes();
  if (is_dense && layer.fine != nullptr) bytes += layer.fine_output_bytes();
  if (form == Form::kMiddle) bytes += layer.middle_output_bytes();
  // One pass over the coarse plane serves residual, middle and dense rows: counted with the first
  // of these forms that there is.
  const bool reads_coarse = !is_dense || layer.fine != nullptr;
  const RowBlock all = {.begin = 0, .end = call.rows};
  const bool was_counted =
      form != Form::kResidual && (Has(groups, OfForm(Form::kResidual), all) ||
                                  (is_dense && Has(groups, OfForm(Form::kMiddle), all)));
  if (reads_coarse && !was_counted) bytes += layer.coarse_output_bytes();
  state.executed.weight_bytes += outputs * bytes;
}

void LinearRunner::UnpackB(const FactorStage& stage, int64_t first_output, int64_t begin,
                           int64_t end, float* panel) const {
  const int64_t unit = first_output / kUnitOutputs;
  for (const BSegment& segment : stage.factors->SegmentsOf(end)) {
    const int64_t from = std::max(begin, segment.begin);
    const int64_t to = std::min(end, segment.begin + segment.size);
    if (from >= to) continue;
    const int64_t skipped = from - segment.begin;
    kernels_->panel_from_b(
        segment.Panel(unit) + skipped * kUnitOutputs + 2 * (first_output % kUnitOutputs),
        segment.PanelScales(unit) + skipped, to - from, panel + (from - begin) * kPanelOutputs);
  }
}

void LinearRunner::UnpackBCodes(const FactorStage& stage, int64_t first_output, int64_t begin,
                                int64_t end, uint8_t* panel) const {
  static constexpr int8_t kNoPair[2 * kPanelOutputs] = {};
  const int64_t unit = first_output / kUnitOutputs;
  for (int64_t k = begin; k < end; k += kGroupSize, panel += kernels_->int8_group_bytes) {
    const int8_t* pairs[kGroupSize / 2];
    uint16_t scales[kGroupSize] = {};
    std::fill_n(pairs, kGroupSize / 2, kNoPair);
    for (const BSegment& segment : stage.factors->SegmentsOf(end)) {
      const int64_t from = std::max(k, segment.begin);
      const int64_t to = std::min({k + kGroupSize, end, segment.begin + segment.size});
      const int8_t* codes = segment.Panel(unit) + 2 * (first_output % kUnitOutputs);
      for (int64_t i = from; i < to; i += 2)
        pairs[(i - k) / 2] = codes + (i - segment.begin) * kUnitOutputs;
      if (from < to)
        std::copy_n(segment.PanelScales(unit) + from - segment.begin, to - from, scales + from - k);
    }
    kernels_->int8_group_from_b(pairs, scales, stage.factors->largest_b_scales + k, panel);
  }
}

void LinearRunner::MultiplyByB(const LinearCall& call, const PartPlan& plan,
                               const FactorStage& stage, int64_t panel, RowBlock block,
                               const Outputs& to, int thread) {
  const PackedLinear& layer = *plan.layer;
  const std::span<const RowGroup> groups = plan.part->groups;
  const int64_t first = panel * kPanelOutputs;
  const int64_t outputs = std::min(kPanelOutputs, stage.outputs - first);
  const bool in_codes = ArithmeticOfPlanes(layer) == Arithmetic::kInt8;
  const int64_t depth_of_panel = DepthOfPanel(ArithmeticOfPlanes(layer));
  ThreadState& state = threads_[thread];
  for (int64_t begin = 0; begin < stage.max_rank; begin += depth_of_panel) {
    const int64_t end = std::min(stage.max_rank, begin + depth_of_panel);
    // Residual rows have their bias, and an output to add to, from the coarse plane; outputs of a
    // gar pair get theirs when they are scattered.
    const bool is_first = stage.form != Form::kResidual && begin == 0;
    const bool is_ordered = !stage.IsGar();
    const float* bias =
        is_first && is_ordered && layer.bias != nullptr ? layer.bias + first : nullptr;
    const bool adds = (is_ordered && call.add_to_output) || !is_first;
    auto* floats = reinterpret_cast<float*>(state.panel);
    if (in_codes) {
      UnpackBCodes(stage, first, begin, end, state.panel);
    } else {
      UnpackB(stage, first, begin, end, floats);
    }
    for (const RowGroup& group : groups) {
      const RowGroup rows = PartOf(group, block);
      if (!stage.Runs(rows) || rows.rank <= begin || rows.begin >= rows.end) continue;
      const int64_t num_rows = rows.end - rows.begin;
      const int64_t depth = std::min(end, rows.rank) - begin;
      const int64_t z = stage.z_offset + rows.begin * stage.z_stride + begin;
      float* out = to.Row(rows.begin);
      if (in_codes) {
        kernels_->int8_gemm(z_codes_.From(z, stage.z_stride), num_rows, NumGroups(depth),
                            state.panel, bias, out, to.stride, outputs, adds);
      } else {
        kernels_->gemm(z_.data() + z, stage.z_stride, num_rows, depth, floats, bias, out, to.stride,
                       outputs, adds);
      }
      state.executed.flops += 2 * num_rows * outputs * depth;
    }
  }
  // Counted once for the two panels that share the component's 32 outputs.
  if (first % kUnitOutputs == 0 && HasFirst(groups, OfStage(stage), block))
    state.executed.weight_bytes += stage.max_rank * PackedLinear::kBComponentBytes;
}

}  // namespace nestor
