// federa_kernels._C: every exported function, one line each. Importing it touches no device and starts no thread.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cpu/attention.h"
#include "cpu/features.h"
#include "cpu/lora_linear.h"
#include "cpu/tiles.h"
#include "cpu/truncated_svd.h"
#include "cuda/devices.h"
#include "cuda/lora_linear_mma.h"
#include "cuda/lora_linear_sm90.h"
#include "cuda/truncated_svd.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

#if defined(__clang__)
constexpr const char* compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* compiler = "gcc " __VERSION__;
#else
constexpr const char* compiler = "msvc";
#endif

#ifdef _MSVC_LANG
constexpr long cpp_standard = _MSVC_LANG;
#else
constexpr long cpp_standard = __cplusplus;
#endif

py::dict build_info() {
    py::dict info("version"_a = FEDERA_VERSION, "compiler"_a = compiler, "cpp_standard"_a = cpp_standard,
                  "cuda_version"_a = py::none(), "cuda_missing"_a = py::none(),
                  "architectures"_a = py::str(FEDERA_ARCHITECTURES).attr("split")());
#ifdef FEDERA_CUDA_MISSING
    info["cuda_missing"] = FEDERA_CUDA_MISSING;
#else
    info["cuda_version"] = federa::cuda_version();
#endif
    return info;
}

py::dict cpu_features() {
    py::dict features;
    for (const auto& [name, there] : federa::cpu_features()) features[name] = there;
    return features;
}

py::object cuda_devices() {
#ifdef FEDERA_CUDA_MISSING
    return py::str("no CUDA half: " FEDERA_CUDA_MISSING);
#else
    std::string error;
    py::list devices;
    for (const auto& device : federa::cuda_devices(error))
        devices.append(py::dict("name"_a = device.name, "capability"_a = py::make_tuple(device.major, device.minor),
                                "memory"_a = device.memory));
    if (!error.empty()) return py::str(error);
    return std::move(devices);
#endif
}

// Addresses come as integers, 0 for none; one letter tells float32 ("f") from bfloat16 ("b").
using Address = std::uintptr_t;
using Index = std::int64_t;

template <class T>
T* pointer(const py::handle& address) {
    return reinterpret_cast<T*>(address.cast<Address>());
}

federa::Kind kind_of(const py::handle& letter) {
    return letter.cast<std::string>() == "f" ? federa::Kind::float32 : federa::Kind::bfloat16;
}

// (offsets, scalings, ranks) of `count` clients, or none: one client who has all rows and components.
class ClientsOf {
  public:
    ClientsOf(const py::tuple& clients, Index count, Index rows)
        : offsets_{0, static_cast<std::int32_t>(rows)}, clients_{1, offsets_, &one_, &all_} {
        if (clients.empty()) return;
        clients_ = {count, pointer<const std::int32_t>(clients[0]), pointer<const float>(clients[1]),
                    pointer<const std::int32_t>(clients[2])};
        bool sound = count > 0 && clients_.offsets[0] == 0 && clients_.offsets[count] == rows;
        for (Index c = 0; c < count; ++c) sound = sound && clients_.offsets[c] <= clients_.offsets[c + 1];
        if (!sound) throw py::value_error("lora_linear_clients: segments must end at the rows of x");
    }
    const federa::Clients& get() const { return clients_; }

  private:
    std::int32_t offsets_[2], all_ = INT32_MAX;
    float one_ = 1.0f;
    federa::Clients clients_;
};

federa::Projection projection_of(const py::tuple& t) {
    int i = 0;
    const auto next = [&]() -> py::object { return t[i++]; };
    const auto index = [&] { return next().cast<Index>(); };
    federa::Projection p;
    p.packed = pointer<const void>(next()), p.kind = kind_of(next());
    p.columns = index(), p.rank = index(), p.scaling = next().cast<float>();
    p.down = pointer<const float>(next()), p.up = pointer<const float>(next());
    p.down_client = index(), p.down_rank = index(), p.down_depth = index();
    p.up_client = index(), p.up_column = index(), p.up_rank = index();
    p.bias = pointer<const float>(next()), p.bias_client = index();
    p.out = pointer<void>(next()), p.h = pointer<void>(next()), p.h_stride = index();
    return p;
}

py::list engines() {
    py::list names;
    for (const char* name : federa::engines()) names.append(name);
    return names;
}

void set_engine(const std::string& name) {
    if (!federa::set_engine(name.c_str())) throw py::value_error("set_engine: name must be of engines(), got " + name);
}

void pack(Address source, const py::str& kind, Index columns, Index column_stride, Index depth, Index depth_stride,
          Address packed, int threads) {
    const federa::Kind of = kind_of(kind);
    py::gil_scoped_release released;
    federa::pack(reinterpret_cast<const void*>(source), of, columns, column_stride, depth, depth_stride,
                 reinterpret_cast<void*>(packed), threads);
}

void low_rank_linear(Address x, const py::str& kind, Index rows, Index depth, Index x_stride, const py::list& list,
                     const py::tuple& clients, Index count, int threads) {
    const ClientsOf of(clients, count, rows);
    const federa::Kind x_kind = kind_of(kind);
    std::vector<federa::Projection> projections;
    for (const auto& each : list) projections.push_back(projection_of(each.cast<py::tuple>()));
    py::gil_scoped_release released;
    federa::low_rank_linear(reinterpret_cast<const void*>(x), x_kind, rows, depth, x_stride, projections, of.get(),
                            false, threads);
}

// (packed, kind, columns, depth, rank, scaling, A and its strides, B and its strides)
federa::Layer layer_of(const py::tuple& t) {
    int i = 0;
    const auto next = [&]() -> py::object { return t[i++]; };
    const auto index = [&] { return next().cast<Index>(); };
    federa::Layer l;
    l.packed = pointer<const void>(next()), l.kind = kind_of(next());
    l.columns = index(), l.depth = index(), l.rank = index(), l.scaling = next().cast<float>();
    l.A = pointer<const float>(next()), l.A_client = index(), l.A_rank = index(), l.A_depth = index();
    l.B = pointer<const float>(next()), l.B_client = index(), l.B_column = index(), l.B_rank = index();
    return l;
}

void low_rank_backward(const py::tuple& layer, const py::str& kind, Index rows, Address dy, Index dy_stride, Address x,
                       Index x_stride, Address h, Index h_stride, const py::tuple& clients, Index count,
                       bool accumulate, Address dx, Address dA, Address dB, int threads) {
    const ClientsOf of(clients, count, rows);
    const federa::Layer l = layer_of(layer);
    const federa::Kind x_kind = kind_of(kind);
    const auto rows_of = [](Address data, Index stride) {
        return federa::Rows{reinterpret_cast<const void*>(data), stride};
    };
    py::gil_scoped_release released;
    federa::low_rank_backward(l, x_kind, rows, rows_of(dy, dy_stride), rows_of(x, x_stride), rows_of(h, h_stride),
                              of.get(), accumulate, reinterpret_cast<void*>(dx), reinterpret_cast<float*>(dA),
                              reinterpret_cast<float*>(dB), threads);
}

// shape: (keys, queries, examples, heads, dim, scale); q, k, ...: (data, stride of tokens, stride of heads).
federa::AttentionShape attention_shape(const py::tuple& shape) {
    return {pointer<const std::int64_t>(shape[0]), pointer<const std::int64_t>(shape[1]), shape[2].cast<Index>(),
            shape[3].cast<Index>(), shape[4].cast<Index>(), shape[5].cast<float>()};
}

template <class T>
federa::Heads<T> heads_of(const py::tuple& tensor) {
    return {pointer<T>(tensor[0]), tensor[1].cast<Index>(), tensor[2].cast<Index>()};
}

template <class T>
void attention_forward_of(const py::tuple& shape, const py::tuple& q, const py::tuple& k, const py::tuple& v,
                          const py::tuple& out, Address softmax, int threads) {
    const auto of = attention_shape(shape);
    const auto query = heads_of<const T>(q), key = heads_of<const T>(k), value = heads_of<const T>(v);
    const auto result = heads_of<T>(out);
    py::gil_scoped_release released;
    federa::attention_forward<T>(of, query, key, value, result, reinterpret_cast<float*>(softmax), threads);
}

template <class T>
void attention_backward_of(const py::tuple& shape, const py::tuple& q, const py::tuple& k, const py::tuple& v,
                           const py::tuple& out, Address softmax, const py::tuple& d_out, const py::tuple& dq,
                           const py::tuple& dk, const py::tuple& dv, int threads) {
    const auto of = attention_shape(shape);
    const auto query = heads_of<const T>(q), key = heads_of<const T>(k), value = heads_of<const T>(v);
    const auto result = heads_of<const T>(out), d = heads_of<const T>(d_out);
    const auto d_query = heads_of<T>(dq), d_key = heads_of<T>(dk), d_value = heads_of<T>(dv);
    py::gil_scoped_release released;
    federa::attention_backward<T>(of, query, key, value, result, reinterpret_cast<const float*>(softmax), d, d_query,
                                  d_key, d_value, threads);
}

void attention_forward(const py::str& kind, const py::tuple& shape, const py::tuple& q, const py::tuple& k,
                       const py::tuple& v, const py::tuple& out, Address softmax, int threads) {
    const bool wide = kind_of(kind) == federa::Kind::float32;
    const auto run = wide ? attention_forward_of<float> : attention_forward_of<std::uint16_t>;
    run(shape, q, k, v, out, softmax, threads);
}

void attention_backward(const py::str& kind, const py::tuple& shape, const py::tuple& q, const py::tuple& k,
                        const py::tuple& v, const py::tuple& out, Address softmax, const py::tuple& d_out,
                        const py::tuple& dq, const py::tuple& dk, const py::tuple& dv, int threads) {
    const bool wide = kind_of(kind) == federa::Kind::float32;
    const auto run = wide ? attention_backward_of<float> : attention_backward_of<std::uint16_t>;
    run(shape, q, k, v, out, softmax, d_out, dq, dk, dv, threads);
}

// Of each (A, N, K, lda, rank, block, columns, goal, gram, U, S, Vh, left): (status, ||A V - U S||, following, matvecs).
py::list truncated_svd(const py::list& list, int threads) {
    std::vector<federa::SvdTask> tasks;
    for (const auto& each : list) {
        const auto fields = each.cast<py::tuple>();
        const auto index = [&](int i) { return fields[i].cast<Index>(); };
        const auto address = [&](int i) { return reinterpret_cast<void*>(fields[i].cast<Address>()); };
        federa::SvdTask task{};
        task.A = static_cast<const float*>(address(0));
        task.N = index(1), task.K = index(2), task.lda = index(3);
        task.rank = index(4), task.block = index(5), task.columns = index(6), task.goal = fields[7].cast<double>();
        task.gram = fields[8].cast<bool>();
        task.U = static_cast<float*>(address(9)), task.S = static_cast<float*>(address(10));
        task.Vh = static_cast<float*>(address(11)), task.left = static_cast<double*>(address(12));
        tasks.push_back(task);
    }
    const auto interrupted = [] {
        py::gil_scoped_acquire held;
        return PyErr_CheckSignals() != 0;  // runs Python's handlers, in the main thread alone
    };
    bool done;
    {
        py::gil_scoped_release released;
        done = federa::truncated_svd(tasks.data(), static_cast<long>(tasks.size()), threads, interrupted);
    }
    if (!done) throw py::error_already_set();
    py::list results;
    for (const auto& task : tasks)
        results.append(py::make_tuple(static_cast<int>(task.status), task.right, task.following, task.matvecs));
    return results;
}

#ifndef FEDERA_CUDA_MISSING
void cholesky_qr(bool wide, Index G, Index K, Index b, Address Y, Index Y_batch, Index Y_row, Address Q, Index Q_batch,
                 Index Q_row, Address noise, Address R, Index R_batch, Address work, Address stream) {
    const auto at = [](Address address) { return reinterpret_cast<void*>(address); };
    federa::cholesky_qr(wide, G, K, b, {at(Y), Y_batch, Y_row}, {at(Q), Q_batch, Q_row}, at(noise),
                        static_cast<double*>(at(R)), R_batch, static_cast<double*>(at(work)), at(stream));
}

void symmetric_eigenpairs(Index G, Index n, Address H, Address values, Address vectors, Address stream) {
    federa::symmetric_eigenpairs(G, n, reinterpret_cast<const double*>(H), reinterpret_cast<double*>(values),
                                 reinterpret_cast<double*>(vectors), reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels of federa: raw pointers and sizes in, nothing of torch.";
    module.def("build_info", &build_info, "version, compiler, cpp_standard, cuda_version or cuda_missing, architectures");
    module.def("cpu_features", &cpu_features, "name -> whether this processor and operating system can run it");
    module.def("engines", &engines, "the implementations of low_rank_linear that run here, best first: amx, avx512, avx2");
    module.def("engine", &federa::engine, "the one in use, or none");
    module.def("set_engine", &set_engine, "for tests and measurements: uses another; what is packed must be packed again");
    module.def("packed_bytes", [](const py::str& kind, Index columns, Index depth) {
        return federa::packed_bytes(kind_of(kind), columns, depth);
    });
    module.def("pack", &pack);
    module.def("low_rank_linear", &low_rank_linear);
    module.def("low_rank_backward", &low_rank_backward);
    module.def("attention_available", &federa::attention_available, "whether the two below run here for heads of a size");
    module.def("attention_forward", &attention_forward);
    module.def("attention_backward", &attention_backward);
    module.def("truncated_svd", &truncated_svd);
    module.def("has_tiles", &federa::tiles_available, "whether this processor and operating system have tile units (AMX)");
#ifndef FEDERA_CUDA_MISSING
    module.def("lora_linear_mma", [](const std::string& kernel, Address arguments, std::size_t bytes, Address stream) {
        federa::mma_kernels::run(kernel.c_str(), reinterpret_cast<const void*>(arguments), bytes,
                                 reinterpret_cast<void*>(stream));
    });
    module.def("lora_linear_sm90", [](const std::string& kernel, Address arguments, std::size_t bytes, Address stream) {
        federa::sm90_kernels::run(kernel.c_str(), reinterpret_cast<const void*>(arguments), bytes,
                                  reinterpret_cast<void*>(stream));
    });
    module.def("cholesky_qr", &cholesky_qr, "of panels on a GPU, on a stream; Y = Q R");
    module.def("cholesky_qr_work", &federa::cholesky_qr_work, "float64 entries that cholesky_qr needs beside them");
    module.def("symmetric_eigenpairs", &symmetric_eigenpairs, "of small matrices on a GPU, on a stream");
#endif
    module.def("cuda_devices", &cuda_devices, "[{name, capability, memory in bytes}], or the driver's error as text");
}
