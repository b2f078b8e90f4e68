// Python bindings of the torch-free kernels: pointers and streams arrive as integers, sizes and strides as int64.
// asyncopd/backends/{cpu,cuda}.py check the tensors; asyncopd/_C.pyi describes this module.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/gather.h"
#include "cpu/isa.h"
#include "cpu/sparse_head.h"
#include "cpu/kl.h"
#include "cpu/pages.h"
#include "cpu/support.h"
#ifdef ASYNCOPD_WITH_CUDA
#include "cuda/gather.h"
#include "cuda/topk.h"
#endif

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

int cpu_gather_logprobs(uintptr_t logits, int dtype, int64_t row_stride, uintptr_t ids, int id_type, int64_t rows,
                        int64_t vocab, int64_t num_ids, double inv_temperature, uintptr_t logprobs, uintptr_t lse,
                        int threads, int isa) {
  return asyncopd_cpu_gather_logprobs(pointer<void>(logits), dtype, row_stride, pointer<void>(ids), id_type, rows,
                                      vocab, num_ids, inv_temperature, pointer<float>(logprobs), pointer<float>(lse),
                                      threads, isa);
}

int cpu_gather_logprobs_backward(uintptr_t grad, uintptr_t logits, int dtype, int64_t row_stride, uintptr_t lse,
                                 uintptr_t ids, int id_type, int64_t rows, int64_t first, int64_t columns,
                                 int64_t vocab, int64_t num_ids, double inv_temperature, uintptr_t dlogits,
                                 int64_t out_stride, int threads, int isa) {
  return asyncopd_cpu_gather_logprobs_backward(pointer<float>(grad), pointer<void>(logits), dtype, row_stride,
                                               pointer<float>(lse), pointer<void>(ids), id_type, rows, first, columns,
                                               vocab, num_ids, inv_temperature, pointer<void>(dlogits), out_stride,
                                               threads, isa);
}

int cpu_gather_tile(uintptr_t logits, int64_t row_stride, uintptr_t ids, int64_t rows, int64_t first, int64_t columns,
                    int64_t num_ids, double inv_temperature, uintptr_t peaks, uintptr_t sums, uintptr_t logprobs,
                    uintptr_t lse, int threads, int isa) {
  return asyncopd_cpu_gather_tile(pointer<float>(logits), row_stride, pointer<int64_t>(ids), rows, first, columns,
                                  num_ids, inv_temperature, pointer<float>(peaks), pointer<double>(sums),
                                  pointer<float>(logprobs), pointer<float>(lse), threads, isa);
}

int cpu_topk_logprobs(uintptr_t logits, int dtype, int64_t row_stride, int64_t rows, int64_t vocab, int64_t k,
                      double inv_temperature, uintptr_t ids, uintptr_t logprobs, uintptr_t lse, int threads, int isa) {
  return asyncopd_cpu_topk_logprobs(pointer<void>(logits), dtype, row_stride, rows, vocab, k, inv_temperature,
                                    pointer<int64_t>(ids), pointer<float>(logprobs), pointer<float>(lse), threads, isa);
}

int cpu_sample_support(uintptr_t logits, int dtype, int64_t row_stride, int64_t rows, int64_t vocab,
                       int64_t num_samples, int64_t head, int64_t seed, uintptr_t streams, uintptr_t sampled_ids,
                       double inv_temperature, uintptr_t ids, uintptr_t log_weights, uintptr_t logprobs, uintptr_t lse,
                       int threads, int isa) {
  return asyncopd_cpu_sample_support(pointer<void>(logits), dtype, row_stride, rows, vocab, num_samples, head, seed,
                                     pointer<int64_t>(streams), pointer<int64_t>(sampled_ids), inv_temperature,
                                     pointer<int64_t>(ids), pointer<float>(log_weights), pointer<float>(logprobs),
                                     pointer<float>(lse), threads, isa);
}

int cpu_linear_gather_logits(uintptr_t hidden, int64_t hidden_stride, int hidden_dtype, uintptr_t weight,
                             int64_t weight_stride, int dtype, uintptr_t bias, uintptr_t ids, int id_type,
                             uintptr_t mask, int64_t rows, int64_t vocab, int64_t width, int64_t num_ids,
                             double temperature, double logit_scale, double softcap, uintptr_t logits, int threads,
                             int isa) {
  return asyncopd_cpu_linear_gather_logits(pointer<void>(hidden), hidden_stride, hidden_dtype, pointer<void>(weight),
                                           weight_stride, dtype, pointer<float>(bias), pointer<void>(ids), id_type,
                                           pointer<uint8_t>(mask), rows, vocab, width, num_ids, temperature,
                                           logit_scale, softcap, pointer<float>(logits), threads, isa);
}

int cpu_linear_gather_logits_backward(uintptr_t grad, uintptr_t logits, uintptr_t hidden, int64_t hidden_stride,
                                      int hidden_dtype, uintptr_t weight, int64_t weight_stride, int dtype,
                                      uintptr_t ids, int id_type, uintptr_t mask, int64_t rows, int64_t vocab,
                                      int64_t width, int64_t num_ids, double temperature, double logit_scale,
                                      double softcap, uintptr_t dhidden, uintptr_t dweight, int64_t dweight_stride,
                                      int dweight_dtype, bool add, uintptr_t dbias, int threads, int isa) {
  return asyncopd_cpu_linear_gather_logits_backward(
      pointer<float>(grad), pointer<float>(logits), pointer<void>(hidden), hidden_stride, hidden_dtype,
      pointer<void>(weight), weight_stride, dtype, pointer<void>(ids), id_type, pointer<uint8_t>(mask), rows, vocab,
      width, num_ids, temperature, logit_scale, softcap, pointer<void>(dhidden), pointer<void>(dweight), dweight_stride,
      dweight_dtype, add, pointer<float>(dbias), threads, isa);
}

int cpu_kl_rows(uintptr_t student, uintptr_t teacher, uintptr_t log_weights, uintptr_t ids, int id_type, uintptr_t mask,
                uintptr_t proximal, int64_t rows, int64_t num_ids, const KlOptions& options, double denominator,
                uintptr_t losses, uintptr_t loss, uintptr_t coef, uintptr_t metrics, int threads, int isa) {
  return asyncopd_cpu_kl_rows(pointer<float>(student), pointer<float>(teacher), pointer<float>(log_weights),
                              pointer<void>(ids), id_type, pointer<uint8_t>(mask), pointer<float>(proximal), rows,
                              num_ids, &options, denominator, pointer<float>(losses), pointer<float>(loss),
                              pointer<float>(coef), pointer<float>(metrics), threads, isa);
}

void cpu_scale_rows(uintptr_t values, int64_t rows, int64_t columns, uintptr_t factors, int64_t stride, int threads) {
  asyncopd_cpu_scale_rows(pointer<float>(values), rows, columns, pointer<float>(factors), stride, threads);
}

void cpu_populate(uintptr_t memory, int64_t bytes, int threads) {
  asyncopd_cpu_populate(pointer<void>(memory), bytes, threads);
}

py::list cpu_isas() {
  py::list names;
  for (int isa = 0; asyncopd_cpu_isa_name(isa) != nullptr; ++isa) names.append(asyncopd_cpu_isa_name(isa));
  return names;
}

#ifdef ASYNCOPD_WITH_CUDA
int cuda_gather_logprobs(uintptr_t logits, int dtype, int64_t row_stride, uintptr_t ids, int id_type, int64_t rows,
                         int64_t vocab, int64_t num_ids, double inv_temperature, uintptr_t logprobs, uintptr_t lse,
                         int device, uintptr_t stream) {
  return asyncopd_cuda_gather_logprobs(pointer<void>(logits), dtype, row_stride, pointer<void>(ids), id_type, rows,
                                       vocab, num_ids, inv_temperature, pointer<float>(logprobs), pointer<float>(lse),
                                       device, pointer<void>(stream));
}

int cuda_topk_logprobs(uintptr_t logits, int dtype, int64_t row_stride, int64_t rows, int64_t vocab, int64_t k,
                       double inv_temperature, int64_t parts, uintptr_t scratch, uintptr_t ids, uintptr_t logprobs,
                       uintptr_t lse, int device, uintptr_t stream) {
  return asyncopd_cuda_topk_logprobs(pointer<void>(logits), dtype, row_stride, rows, vocab, k, inv_temperature, parts,
                                     pointer<void>(scratch), pointer<int64_t>(ids), pointer<float>(logprobs),
                                     pointer<float>(lse), device, pointer<void>(stream));
}
#endif

}  // namespace

// No state of its own, hence no need of the GIL either.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of asyncopd: raw pointers in, a status out. Use asyncopd.backends, which checks tensors.";
#ifdef __SANITIZE_ADDRESS__
  m.attr("sanitized") = true;
#else
  m.attr("sanitized") = false;
#endif
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("cpu_isas", &cpu_isas, "Instruction-set levels that this build has and this machine runs, worst first.");
  m.def("cpu_gather_logprobs", &cpu_gather_logprobs, py::call_guard<py::gil_scoped_release>(), py::arg("logits"),
        py::arg("dtype"), py::arg("row_stride"), py::arg("ids"), py::arg("id_type"), py::arg("rows"),
        py::arg("vocab"), py::arg("num_ids"), py::arg("inv_temperature"), py::arg("logprobs"), py::arg("lse"),
        py::arg("threads"), py::arg("isa") = -1);
  m.def("cpu_gather_logprobs_backward", &cpu_gather_logprobs_backward, py::call_guard<py::gil_scoped_release>(),
        py::arg("grad"), py::arg("logits"), py::arg("dtype"), py::arg("row_stride"), py::arg("lse"), py::arg("ids"),
        py::arg("id_type"), py::arg("rows"), py::arg("first"), py::arg("columns"), py::arg("vocab"),
        py::arg("num_ids"), py::arg("inv_temperature"), py::arg("dlogits"), py::arg("out_stride"), py::arg("threads"),
        py::arg("isa") = -1);
  m.def("cpu_gather_tile", &cpu_gather_tile, py::call_guard<py::gil_scoped_release>(), py::arg("logits"),
        py::arg("row_stride"), py::arg("ids"), py::arg("rows"), py::arg("first"), py::arg("columns"),
        py::arg("num_ids"), py::arg("inv_temperature"), py::arg("peaks"), py::arg("sums"), py::arg("logprobs"),
        py::arg("lse"), py::arg("threads"), py::arg("isa") = -1);
  m.def("cpu_topk_logprobs", &cpu_topk_logprobs, py::call_guard<py::gil_scoped_release>(), py::arg("logits"),
        py::arg("dtype"), py::arg("row_stride"), py::arg("rows"), py::arg("vocab"), py::arg("k"),
        py::arg("inv_temperature"), py::arg("ids"), py::arg("logprobs"), py::arg("lse"), py::arg("threads"),
        py::arg("isa") = -1);
  m.def("cpu_sample_support", &cpu_sample_support, py::call_guard<py::gil_scoped_release>(), py::arg("logits"),
        py::arg("dtype"), py::arg("row_stride"), py::arg("rows"), py::arg("vocab"), py::arg("num_samples"),
        py::arg("head"), py::arg("seed"), py::arg("streams"), py::arg("sampled_ids"), py::arg("inv_temperature"),
        py::arg("ids"), py::arg("log_weights"), py::arg("logprobs"), py::arg("lse"), py::arg("threads"),
        py::arg("isa") = -1);
  m.def("cpu_linear_gather_logits", &cpu_linear_gather_logits, py::call_guard<py::gil_scoped_release>(),
        py::arg("hidden"), py::arg("hidden_stride"), py::arg("hidden_dtype"), py::arg("weight"),
        py::arg("weight_stride"), py::arg("dtype"), py::arg("bias"), py::arg("ids"), py::arg("id_type"),
        py::arg("mask"), py::arg("rows"), py::arg("vocab"), py::arg("width"), py::arg("num_ids"),
        py::arg("temperature"), py::arg("logit_scale"), py::arg("softcap"), py::arg("logits"), py::arg("threads"),
        py::arg("isa") = -1);
  m.def("cpu_linear_gather_logits_backward", &cpu_linear_gather_logits_backward,
        py::call_guard<py::gil_scoped_release>(), py::arg("grad"), py::arg("logits"), py::arg("hidden"),
        py::arg("hidden_stride"), py::arg("hidden_dtype"), py::arg("weight"), py::arg("weight_stride"),
        py::arg("dtype"), py::arg("ids"), py::arg("id_type"), py::arg("mask"), py::arg("rows"), py::arg("vocab"),
        py::arg("width"), py::arg("num_ids"), py::arg("temperature"), py::arg("logit_scale"), py::arg("softcap"),
        py::arg("dhidden"), py::arg("dweight"), py::arg("dweight_stride"), py::arg("dweight_dtype"), py::arg("add"),
        py::arg("dbias"), py::arg("threads"), py::arg("isa") = -1);
  m.def("cpu_populate", &cpu_populate, py::call_guard<py::gil_scoped_release>(), py::arg("memory"), py::arg("bytes"),
        py::arg("threads"));
  // An object, made once for each set of options: eleven arguments by name at every call would cost 2 us.
  py::class_<KlOptions>(m, "KlOptions")
      .def(py::init([](int divergence, int tail, int baseline, bool sampled, bool head_is_certain, bool needs_policy,
                       bool behaviour, double ratio_cap, double clip_eps, double m2_budget, double proximal_cap) {
             return KlOptions{divergence, tail,      baseline, sampled,   head_is_certain, needs_policy,
                              behaviour,  ratio_cap, clip_eps, m2_budget, proximal_cap};
           }),
           py::kw_only(), py::arg("divergence"), py::arg("tail"), py::arg("baseline"), py::arg("sampled"),
           py::arg("head_is_certain"), py::arg("needs_policy"), py::arg("behaviour"), py::arg("ratio_cap"),
           py::arg("clip_eps"), py::arg("m2_budget"), py::arg("proximal_cap"));
  m.def("cpu_kl_rows", &cpu_kl_rows, py::call_guard<py::gil_scoped_release>(), py::arg("student"), py::arg("teacher"),
        py::arg("log_weights"), py::arg("ids"), py::arg("id_type"), py::arg("mask"), py::arg("proximal"),
        py::arg("rows"), py::arg("num_ids"), py::arg("options"), py::arg("denominator"), py::arg("losses"),
        py::arg("loss"), py::arg("coef"), py::arg("metrics"), py::arg("threads"), py::arg("isa") = -1);
  m.def("cpu_scale_rows", &cpu_scale_rows, py::call_guard<py::gil_scoped_release>(), py::arg("values"),
        py::arg("rows"), py::arg("columns"), py::arg("factors"), py::arg("stride"), py::arg("threads"));
#ifdef ASYNCOPD_WITH_CUDA
  m.attr("cuda") = true;
  m.def("cuda_gather_logprobs", &cuda_gather_logprobs, py::call_guard<py::gil_scoped_release>(), py::arg("logits"),
        py::arg("dtype"), py::arg("row_stride"), py::arg("ids"), py::arg("id_type"), py::arg("rows"),
        py::arg("vocab"), py::arg("num_ids"), py::arg("inv_temperature"), py::arg("logprobs"), py::arg("lse"),
        py::arg("device"), py::arg("stream"));
  m.def("cuda_topk_parts", &asyncopd_cuda_topk_parts, "Into how many parts to split rows, to fill a device.",
        py::arg("dtype"), py::arg("rows"), py::arg("vocab"), py::arg("k"), py::arg("multiprocessors"));
  m.def("cuda_topk_scratch_bytes", &asyncopd_cuda_topk_scratch_bytes, "Scratch that this many parts need.",
        py::arg("dtype"), py::arg("rows"), py::arg("vocab"), py::arg("k"), py::arg("parts"));
  m.def("cuda_topk_logprobs", &cuda_topk_logprobs, py::call_guard<py::gil_scoped_release>(), py::arg("logits"),
        py::arg("dtype"), py::arg("row_stride"), py::arg("rows"), py::arg("vocab"), py::arg("k"),
        py::arg("inv_temperature"), py::arg("parts"), py::arg("scratch"), py::arg("ids"), py::arg("logprobs"),
        py::arg("lse"), py::arg("device"), py::arg("stream"));
#else
  m.attr("cuda") = false;
#endif
}
