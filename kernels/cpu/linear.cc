// y = P x + B_r A_r x + bias for up to 16 rows: bound by the bytes of the parts that are read.

#include "kernels/cpu/linear.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "base/check.h"
#include "kernels/call_checks.h"

namespace nestor {
namespace {

// Weights per task at least: what a core reads in about 10 us.
constexpr int64_t kBytesPerTask = int64_t{192} << 10;
// Bytes of A that are claimed at once: half a microsecond of reading, so that threads share even a
// small A evenly.
constexpr int64_t kBytesPerZPiece = int64_t{8} << 10;
// A large A is read in long streams instead.
constexpr int64_t kZPiecesPerThread = 8;
constexpr int kPollsBeforeYield = 10000;
// Rows whose z factor_b rounds at once.
constexpr int64_t kRowsOfScaledZ = 4;
// Parts that room is made for when layers are loaded: q, k and v. More of them are fine.
constexpr int64_t kPartsOfACall = 3;

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// More tasks than threads where there is enough work, since other programs may slow a core down,
// and as many for each: a task more for one of them is what the others wait for.
int64_t NumTasks(int64_t items, int64_t bytes, int num_threads) {
  return std::min(
      items, RoundUp(std::clamp<int64_t>(bytes / kBytesPerTask, 1, 8 * num_threads), num_threads));
}

}  // namespace

void CodedRows::GrowTo(int64_t size) {
  codes.GrowTo(size);
  scales.GrowTo(size / kGroupSize);
  offsets.GrowTo(size / kGroupSize);
}

QuantisedRows CodedRows::From(int64_t at, int64_t stride) const {
  return {.codes = codes.data() + at,
          .code_stride = stride,
          .scales = scales.data() + at / kGroupSize,
          .offsets = offsets.data() + at / kGroupSize,
          .scale_stride = stride / kGroupSize};
}

int64_t LinearRunner::CodeStride(int64_t cols) { return RoundUp(cols, 8 * kGroupSize); }

LinearRunner::LinearRunner(const CpuKernels* kernels, ThreadPool* pool)
    : kernels_(kernels), pool_(pool), threads_(pool->num_threads()) {}

LinearCost LinearRunner::executed() const {
  LinearCost total;
  for (const ThreadState& thread : threads_) total += thread.executed;
  return total;
}

const float* LinearRunner::InputRow(const LinearCall& call, int64_t row) {
  return static_cast<const float*>(call.in.data) + row * call.in.cols;
}

float* LinearRunner::OutputRow(const LinearPart& part, int64_t row) {
  return static_cast<float*>(part.out.data) + row * part.out.cols;
}

void LinearRunner::PrepareFor(const PackedLinear& layer) {
  int64_t z_size = PaddedToGroup(layer.residual.max_rank) + PaddedToGroup(layer.prefix.max_rank);
  int64_t max_rank = std::max(layer.residual.max_rank, layer.prefix.max_rank);
  for (const PackedGar& pair : layer.gar) {
    z_size += PaddedToGroup(pair.factors.max_rank);
    max_rank = std::max(max_rank, pair.factors.max_rank);
  }
  z_.GrowTo(kPartsOfACall * kMaxFewRows * z_size);
  input_codes_.GrowTo(kMaxFewRows * CodeStride(layer.in));
  plans_.resize(std::max<size_t>(plans_.size(), kPartsOfACall));
  for (PartPlan& plan : plans_) plan.all_stages.reserve(2 + layer.gar.size());
  if (layer.float_activations) {  // few rows then run as many do
    rounded_parts_.reserve(kPartsOfACall);
    float_parts_.reserve(kPartsOfACall);
    if (kernels_->int8_gemm != nullptr) z_codes_.GrowTo(kPartsOfACall * kMaxFewRows * z_size);
    bf16_input_.GrowTo(kMaxFewRows * RoundUp(layer.in, 16));
    if (!layer.gar.empty()) {
      for (ThreadState& thread : threads_)
        thread.unordered.GrowTo(LargestBlock(kMaxFewRows) * kPanelOutputs);
    }
  }
  const bool unpacks_middle = layer.middle != nullptr && kernels_->middle_planes == nullptr;
  for (ThreadState& thread : threads_) {
    thread.scaled_z.GrowTo(kRowsOfScaledZ * PaddedToGroup(max_rank));
    if (unpacks_middle) thread.fine.GrowTo(layer.groups() * kFineGroupBytes);
  }
}

void LinearRunner::Run(const LinearCall& call, std::span<const PackedLinear> layers) {
  if (call.rows == 0) return;
  const auto in_floats = [&](const LinearPart& part) {
    NESTOR_CHECK(part.layer >= 0 && part.layer < static_cast<LinearId>(layers.size()));
    return layers[part.layer].float_activations;
  };
  const bool has_both = std::any_of(call.parts.begin(), call.parts.end(), in_floats) &&
                        !std::all_of(call.parts.begin(), call.parts.end(), in_floats);
  if (call.rows > kMaxFewRows || !has_both) {
    RunParts(call, layers);
    return;
  }
  rounded_parts_.clear();
  float_parts_.clear();
  for (const LinearPart& part : call.parts)
    (in_floats(part) ? float_parts_ : rounded_parts_).push_back(part);
  LinearCall some = call;
  for (const std::vector<LinearPart>* parts : {&rounded_parts_, &float_parts_}) {
    some.parts = *parts;
    RunParts(some, layers);
  }
}

void LinearRunner::RunParts(const LinearCall& call, std::span<const PackedLinear> layers) {
  PlanCall(call, layers);
  if (call.rows > kMaxFewRows || (!call.parts.empty() && plans_[0].layer->float_activations)) {
    RunManyRows(call);
  } else {
    RunFewRows(call);
  }
}

void LinearRunner::PlanCall(const LinearCall& call, std::span<const PackedLinear> layers) {
  if (plans_.size() < call.parts.size()) plans_.resize(call.parts.size());
  int64_t z_size = 0;
  for (size_t i = 0; i < call.parts.size(); ++i) {
    PartPlan& plan = plans_[i];
    plan.part = &call.parts[i];
    NESTOR_CHECK(plan.part->layer >= 0 && plan.part->layer < static_cast<LinearId>(layers.size()));
    const PackedLinear& layer = layers[plan.part->layer];
    plan.layer = &layer;
    CheckLinearPart(call, *plan.part,
                    {.out = layer.out,
                     .in = layer.in,
                     .has_coarse = layer.coarse != nullptr,
                     .has_middle = layer.middle != nullptr,
                     .residual_rank = layer.residual.max_rank,
                     .prefix_rank = layer.prefix.max_rank});
    plan.num_stages = 0;
    plan.is_all_gar = true;
    for (const RowGroup& group : plan.part->groups) {
      PlanStage(group, &plan);
      plan.is_all_gar = plan.is_all_gar && group.form == Form::kGar;
    }
    for (FactorStage& stage : plan.stages()) {
      stage.z_stride = PaddedToGroup(stage.max_rank);
      stage.z_offset = z_size;
      z_size += stage.z_stride * call.rows;
    }
  }
  z_size_ = z_size;
  z_.GrowTo(z_size);
}

void LinearRunner::PlanStage(const RowGroup& group, PartPlan* plan) {
  if (group.rank == 0) return;
  for (FactorStage& stage : plan->stages()) {
    const bool is_other_pair = stage.IsGar() && stage.max_rank != group.rank;
    if (stage.form != group.form || is_other_pair) continue;
    stage.max_rank = std::max(stage.max_rank, group.rank);
    return;
  }
  if (plan->num_stages == plan->all_stages.size()) plan->all_stages.emplace_back();
  FactorStage& stage = plan->all_stages[plan->num_stages++];
  const PackedLinear& layer = *plan->layer;
  stage.form = group.form;
  stage.max_rank = group.rank;
  if (group.form == Form::kGar) {
    const PackedGar& pair = layer.GarOfRank(group.rank);
    stage.factors = &pair.factors;
    stage.row_order = pair.rows;
    stage.outputs = layer.out - group.rank;
  } else {
    stage.factors = group.form == Form::kResidual ? &layer.residual : &layer.prefix;
    stage.row_order = nullptr;
    stage.outputs = layer.out;
  }
}

void LinearRunner::Scatter(const LinearCall& call, const PartPlan& plan, const FactorStage& stage,
                           int64_t row, int64_t first, int64_t count, const float* values) {
  float* const out = OutputRow(*plan.part, row);
  const float* const bias = plan.layer->bias;
  const int32_t* const order = stage.row_order + first;
  for (int64_t i = 0; i < count; ++i) {
    const float value = values[i] + (bias == nullptr ? 0.0f : bias[order[i]]);
    out[order[i]] = call.add_to_output ? out[order[i]] + value : value;
  }
}

void LinearRunner::RunFewRows(const LinearCall& call) {
  if (NeedsCodes(call)) {
    PrepareCodes(call);
    for (int64_t t = 0; t < call.rows; ++t) {
      QuantiseRow(call, t);
      const QuantisedRows row = input_codes_.From(t * code_stride_, code_stride_);
      quantised_[t] = {
          .codes = row.codes, .scales = row.scales, .offsets = row.offsets, .index = t};
    }
  }
  num_components_ = 0;
  int64_t max_stride = 0;
  int64_t units = 0;
  int64_t weights = 0;
  for (size_t i = 0; i < call.parts.size(); ++i) {
    PlanRows(call, &plans_[i]);
    for (const FactorStage& stage : plans_[i].stages()) {
      num_components_ += stage.max_rank;
      max_stride = std::max(max_stride, stage.z_stride);
    }
    units += NumGroups(plans_[i].layer->out);
    weights += plans_[i].layer->out * plans_[i].layer->in;
  }
  for (ThreadState& thread : threads_) thread.scaled_z.GrowTo(kRowsOfScaledZ * max_stride);
  num_z_pieces_ = std::min(num_components_,
                           std::min<int64_t>(1 + num_components_ * call.in.cols / kBytesPerZPiece,
                                             kZPiecesPerThread * pool_->num_threads()));
  claimed_z_pieces_.store(0, std::memory_order_relaxed);
  finished_z_pieces_.store(0, std::memory_order_relaxed);
  const int64_t num_tasks = NumTasks(units, weights, pool_->num_threads());
  pool_->Run(num_tasks, [&](int64_t task, int thread) {
    RunZPieces(call, thread);
    int64_t begin = units * task / num_tasks;
    int64_t end = units * (task + 1) / num_tasks;
    for (size_t i = 0; i < call.parts.size(); ++i) {
      const int64_t part_units = NumGroups(plans_[i].layer->out);
      const int64_t part_end = std::min(end, part_units);
      for (int64_t unit = std::max<int64_t>(begin, 0); unit < part_end; unit += kUnitsPerRun)
        RunUnits(call, plans_[i], unit, std::min(part_end, unit + kUnitsPerRun), thread);
      begin -= part_units;
      end -= part_units;
    }
  });
}

bool LinearRunner::NeedsCodes(const LinearCall& call) const {
  for (size_t i = 0; i < call.parts.size(); ++i) {
    if (plans_[i].layer->float_activations) continue;
    if (plans_[i].layer->fine != nullptr) return true;
    for (const RowGroup& group : call.parts[i].groups) {
      if (group.form != Form::kDense) return true;
    }
  }
  return false;
}

void LinearRunner::PrepareCodes(const LinearCall& call) {
  code_stride_ = CodeStride(call.in.cols);
  input_codes_.GrowTo(call.rows * code_stride_);
}

void LinearRunner::QuantiseRow(const LinearCall& call, int64_t row) {
  const int64_t at = row * code_stride_;
  kernels_->quantise(InputRow(call, row), call.in.cols, input_codes_.codes.data() + at,
                     input_codes_.scales.data() + at / kGroupSize,
                     input_codes_.offsets.data() + at / kGroupSize);
}

void LinearRunner::AddFactorRows(const RowGroup& group, FactorStage* stage) {
  for (int64_t t = group.begin; t < group.end; ++t) {
    int at = stage->num_rows++;
    for (; at > 0 && stage->ranks[at - 1] < group.rank; --at) {
      stage->rows[at] = stage->rows[at - 1];
      stage->ranks[at] = stage->ranks[at - 1];
    }
    stage->rows[at] = quantised_[t];
    stage->ranks[at] = group.rank;
  }
}

void LinearRunner::PlanRows(const LinearCall& call, PartPlan* plan) {
  plan->num_coarse = plan->num_middle = plan->num_planes = plan->num_dense = 0;
  for (FactorStage& stage : plan->stages()) stage.num_rows = 0;
  for (const RowGroup& group : plan->part->groups) {
    for (int64_t t = group.begin; t < group.end; ++t) {
      if (group.form == Form::kResidual) plan->coarse[plan->num_coarse++] = quantised_[t];
      if (group.form == Form::kMiddle) plan->middle[plan->num_middle++] = quantised_[t];
      if (group.form != Form::kDense) continue;
      if (plan->layer->fine != nullptr) {
        plan->planes[plan->num_planes++] = quantised_[t];
      } else {
        plan->dense[plan->num_dense++] = {.values = InputRow(call, t), .index = t};
      }
    }
    for (FactorStage& stage : plan->stages()) {
      if (stage.Runs(group) && group.rank > 0) AddFactorRows(group, &stage);
    }
  }
}

void LinearRunner::RunZPieces(const LinearCall& call, int thread) {
  while (claimed_z_pieces_.load(std::memory_order_relaxed) < num_z_pieces_) {
    const int64_t piece = claimed_z_pieces_.fetch_add(1, std::memory_order_relaxed);
    if (piece >= num_z_pieces_) return;
    // Components [begin, end) of all stages, one after the other.
    int64_t begin = num_components_ * piece / num_z_pieces_;
    int64_t end = num_components_ * (piece + 1) / num_z_pieces_;
    for (size_t i = 0; i < call.parts.size(); ++i) {
      for (const FactorStage& stage : std::as_const(plans_[i]).stages()) {
        for (int64_t k = std::max<int64_t>(begin, 0); k < std::min(end, stage.max_rank); ++k)
          RunComponent(plans_[i], stage, k, thread);
        begin -= stage.max_rank;
        end -= stage.max_rank;
      }
    }
    finished_z_pieces_.fetch_add(1, std::memory_order_release);
  }
}

void LinearRunner::RunComponent(const PartPlan& plan, const FactorStage& stage, int64_t k,
                                int thread) {
  const PackedLinear& layer = *plan.layer;
  int count = 0;
  while (count < stage.num_rows && stage.ranks[count] > k) ++count;
  float z[kMaxFewRows];
  kernels_->factor_a(stage.factors->a + k * PaddedToGroup(layer.in),
                     stage.factors->a_scales + k * layer.groups(), layer.groups(), stage.rows,
                     count, z);
  for (int i = 0; i < count; ++i)
    z_.data()[stage.z_offset + stage.rows[i].index * stage.z_stride + k] = z[i];
  threads_[thread].executed +=
      {.weight_bytes = layer.a_component_bytes(), .flops = 2 * layer.in * count};
}

void LinearRunner::WaitForZ() const {
  // Every piece is claimed by now, so some thread is at work on what is missing.
  for (int polls = 0; finished_z_pieces_.load(std::memory_order_acquire) < num_z_pieces_; ++polls) {
    if (polls < kPollsBeforeYield) {
      __builtin_ia32_pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void LinearRunner::RunUnits(const LinearCall& call, const PartPlan& plan, int64_t begin,
                            int64_t end, int thread) {
  ThreadState& state = threads_[thread];
  const int64_t unit_size = call.rows * kUnitOutputs;
  for (const FactorStage& stage : plan.stages()) {
    if (stage.IsGar()) RunGarUnits(call, plan, stage, begin, end, thread);
  }
  if (plan.is_all_gar) return;
  std::fill_n(state.sums, (end - begin) * unit_size, 0.0f);
  // All planes first: a stream that is left for a panel of B and taken up again after it costs
  // its first latency anew, 200 ns on a machine where the unit itself takes 400.
  for (int64_t unit = begin; unit < end; ++unit)
    RunPanels(plan, unit, state.sums + (unit - begin) * unit_size, &state);
  if (num_z_pieces_ > 0) {
    WaitForZ();
    for (const FactorStage& stage : plan.stages()) {
      if (!stage.IsGar()) RunFactorB(stage, begin, end, state.sums, unit_size, thread);
    }
  }
  for (int64_t unit = begin; unit < end; ++unit)
    FinishUnit(call, plan, unit, state.sums + (unit - begin) * unit_size, &state.executed);
}

void LinearRunner::RunGarUnits(const LinearCall& call, const PartPlan& plan,
                               const FactorStage& stage, int64_t begin, int64_t end, int thread) {
  ThreadState& state = threads_[thread];
  const int64_t part_units = NumGroups(plan.layer->out);
  const int64_t units = NumGroups(stage.outputs);  // no more than the part's, so the sums have room
  const int64_t first_unit = units * begin / part_units;
  const int64_t last_unit = units * end / part_units;
  const int64_t first_pivot = stage.max_rank * begin / part_units;
  const int64_t num_pivots = stage.max_rank * end / part_units - first_pivot;
  const int64_t unit_size = call.rows * kUnitOutputs;
  std::fill_n(state.sums, (last_unit - first_unit) * unit_size, 0.0f);
  WaitForZ();
  int64_t outputs = num_pivots;
  for (int i = 0; i < stage.num_rows; ++i) {
    const int64_t row = stage.rows[i].index;
    Scatter(call, plan, stage, row, first_pivot, num_pivots,
            z_.data() + stage.z_offset + row * stage.z_stride + first_pivot);
  }
  if (first_unit < last_unit)
    RunFactorB(stage, first_unit, last_unit, state.sums, unit_size, thread);
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t first = unit * kUnitOutputs;
    const int64_t count = std::min(kUnitOutputs, stage.outputs - first);
    outputs += count;
    for (int i = 0; i < stage.num_rows; ++i) {
      const int64_t row = stage.rows[i].index;
      Scatter(call, plan, stage, row, stage.max_rank + first, count,
              state.sums + (unit - first_unit) * unit_size + row * kUnitOutputs);
    }
  }
  state.executed.weight_bytes += outputs * PackedLinear::kRowOrderBytes;
  // Counted once for all pairs, and with other rows where there are any.
  if (plan.layer->bias != nullptr && plan.is_all_gar && &stage == plan.stages().data())
    state.executed.weight_bytes += 4 * outputs;
}

void LinearRunner::FinishUnit(const LinearCall& call, const PartPlan& plan, int64_t unit,
                              float* sums, LinearCost* executed) {
  const PackedLinear& layer = *plan.layer;
  const int64_t begin = unit * kUnitOutputs;
  const int64_t count = std::min(kUnitOutputs, layer.out - begin);
  if (layer.bias != nullptr) executed->weight_bytes += 4 * count;
  for (const RowGroup& group : plan.part->groups) {
    if (group.form == Form::kGar) continue;
    for (int64_t t = group.begin; t < group.end; ++t) {
      float* row = sums + t * kUnitOutputs;
      if (layer.bias != nullptr) {
        for (int64_t o = 0; o < count; ++o) row[o] += layer.bias[begin + o];
      }
      float* out = OutputRow(*plan.part, t) + begin;
      if (call.add_to_output) {
        for (int64_t o = 0; o < count; ++o) out[o] += row[o];
      } else {
        std::copy_n(row, count, out);
      }
    }
  }
}

void LinearRunner::RunPanels(const PartPlan& plan, int64_t unit, float* sums, ThreadState* state) {
  const PackedLinear& layer = *plan.layer;
  LinearCost* const executed = &state->executed;
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t panel = 2 * unit + half;
    const int64_t outputs = std::min(kPanelOutputs, layer.out - panel * kPanelOutputs);
    if (outputs <= 0) break;
    float* out = sums + half * kPanelOutputs;
    const int num_of_planes = plan.num_coarse + plan.num_middle + plan.num_planes;
    executed->flops += 2 * layer.in * outputs * (num_of_planes + plan.num_dense);
    if (num_of_planes > 0) executed->weight_bytes += outputs * layer.coarse_output_bytes();
    if (plan.num_coarse > 0) {
      kernels_->planes(layer.CoarsePanel(panel), nullptr, layer.groups(), plan.coarse,
                       plan.num_coarse, out);
    }
    if (plan.num_middle > 0) {
      if (kernels_->middle_planes != nullptr) {
        kernels_->middle_planes(layer.CoarsePanel(panel), layer.MiddlePanel(panel), layer.groups(),
                                plan.middle, plan.num_middle, out);
      } else {
        kernels_->fine_from_middle(layer.MiddlePanel(panel), layer.groups(), state->fine.data());
        kernels_->planes(layer.CoarsePanel(panel), state->fine.data(), layer.groups(), plan.middle,
                         plan.num_middle, out);
      }
      executed->weight_bytes += outputs * layer.middle_output_bytes();
    }
    if (plan.num_planes > 0) {  // the coarse panel is in the cache if it was needed before
      kernels_->planes(layer.CoarsePanel(panel), layer.FinePanel(panel), layer.groups(),
                       plan.planes, plan.num_planes, out);
      executed->weight_bytes += outputs * layer.fine_output_bytes();
    }
    if (plan.num_dense > 0) executed->weight_bytes += outputs * layer.dense_output_bytes();
    if (plan.num_dense > 0 && layer.dense_bf16 != nullptr) {
      kernels_->bf16_panel(layer.Bf16Panel(panel), layer.in, plan.dense, plan.num_dense, out);
    } else if (plan.num_dense > 0) {
      for (int64_t o = 0; o < outputs; ++o) {
        const float* weights = layer.dense_f32 + (panel * kPanelOutputs + o) * layer.in;
        for (int i = 0; i < plan.num_dense; ++i) {
          out[plan.dense[i].index * kUnitOutputs + o] =
              kernels_->dot(weights, plan.dense[i].values, layer.in);
        }
      }
    }
  }
}

void LinearRunner::RunFactorB(const FactorStage& stage, int64_t begin_unit, int64_t end_unit,
                              float* sums, int64_t unit_size, int thread) {
  ThreadState& state = threads_[thread];
  const int64_t outputs =
      std::min(end_unit * kUnitOutputs, stage.outputs) - begin_unit * kUnitOutputs;
  state.executed.weight_bytes +=
      (end_unit - begin_unit) * stage.max_rank * PackedLinear::kBComponentBytes;
  FloatRow rows[kMaxFewRows];
  // Segment by segment over all units: long streams again.
  for (const BSegment& segment : stage.factors->SegmentsOf(stage.max_rank)) {
    for (int begin = 0; begin < stage.num_rows && stage.ranks[begin] > segment.begin;) {
      const int64_t rank = stage.ranks[begin];
      int count = 0;
      for (; begin + count < stage.num_rows && stage.ranks[begin + count] == rank; ++count) {
        const int64_t index = stage.rows[begin + count].index;
        rows[count] = {
            .values = z_.data() + stage.z_offset + index * stage.z_stride + segment.begin,
            .index = index};
      }
      const int64_t components = std::min(segment.size, rank - segment.begin);
      for (int64_t unit = begin_unit; unit < end_unit; ++unit) {
        kernels_->factor_b(segment.Panel(unit), segment.Panel(unit + 1), segment.PanelScales(unit),
                           components, rows, count, state.scaled_z.data(),
                           sums + (unit - begin_unit) * unit_size);
      }
      state.executed.flops += 2 * outputs * components * count;
      begin += count;
    }
  }
}

}  // namespace nestor
