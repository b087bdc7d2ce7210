// federa_kernels._C: every exported function, one line each. Importing it touches no device and starts no thread.

#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "cpu/features.h"
#include "cuda/devices.h"

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

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels of federa: raw pointers and sizes in, nothing of torch.";
    module.def("build_info", &build_info, "version, compiler, cpp_standard, cuda_version or cuda_missing, architectures");
    module.def("cpu_features", &cpu_features, "name -> whether this processor and operating system can run it");
    module.def("cuda_devices", &cuda_devices, "[{name, capability, memory in bytes}], or the driver's error as text");
}
