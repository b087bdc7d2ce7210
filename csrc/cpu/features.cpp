#include "cpu/features.h"

#include <cstdint>

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64)
#define FEDERA_X86 1
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace federa {
namespace {

#ifdef FEDERA_X86
struct Registers {
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf = 0) {
    Registers r;
#ifdef _MSC_VER
    int values[4];
    __cpuid(values, 0);
    if (leaf > static_cast<std::uint32_t>(values[0])) return r;
    __cpuidex(values, static_cast<int>(leaf), static_cast<int>(subleaf));
    r.eax = values[0], r.ebx = values[1], r.ecx = values[2], r.edx = values[3];
#else
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves zeros where the leaf is unknown
#endif
    return r;
}

// The register states that the operating system saves: without them an instruction faults whatever cpuid says.
std::uint64_t saved_states() {
    if (!(cpuid(1).ecx >> 27 & 1)) return 0;  // OSXSAVE
#ifdef _MSC_VER
    return _xgetbv(0);
#else
    std::uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<std::uint64_t>(high) << 32 | low;
#endif
}
#endif

#if defined(__aarch64__) && defined(__APPLE__)
bool apple(const char* name) {
    int value = 0;
    std::size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

}  // namespace

std::vector<std::pair<const char*, bool>> cpu_features() {
    bool avx2 = false, fma = false, f16c = false, avx512f = false, avx512bw = false, avx512vl = false;
    bool avx512_vnni = false, avx512_bf16 = false, avx512_fp16 = false, amx_tile = false, amx_int8 = false;
    bool amx_bf16 = false, neon = false, asimddp = false, bf16 = false, sve = false;

#ifdef FEDERA_X86
    const auto bit = [](std::uint32_t word, int position) { return (word >> position & 1) != 0; };
    const Registers basic = cpuid(1), extended = cpuid(7), more = cpuid(7, 1);
    const std::uint64_t states = saved_states();
    const bool ymm = (states & 0x6) == 0x6;           // XMM, YMM
    const bool zmm = (states & 0xe6) == 0xe6;         // and opmask, upper ZMM, ZMM16-31
    const bool tiles = (states & 0x60000) == 0x60000; // TILECFG, TILEDATA
    fma = ymm && bit(basic.ecx, 12);
    f16c = ymm && bit(basic.ecx, 29);
    avx2 = ymm && bit(extended.ebx, 5);
    avx512f = zmm && bit(extended.ebx, 16);
    avx512bw = zmm && bit(extended.ebx, 30);
    avx512vl = zmm && bit(extended.ebx, 31);
    avx512_vnni = zmm && bit(extended.ecx, 11);
    avx512_fp16 = zmm && bit(extended.edx, 23);
    avx512_bf16 = zmm && bit(more.eax, 5);
    amx_bf16 = tiles && bit(extended.edx, 22);
    amx_tile = tiles && bit(extended.edx, 24);
    amx_int8 = tiles && bit(extended.edx, 25);
#elif defined(__aarch64__) && defined(__linux__)
    const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    neon = first >> 1 & 1;  // HWCAP_ASIMD, and so on; the numbers are the kernel's, older headers lack the names
    asimddp = first >> 20 & 1;
    sve = first >> 22 & 1;
    bf16 = second >> 14 & 1;
#elif defined(__aarch64__) && defined(__APPLE__)
    neon = true;
    asimddp = apple("hw.optional.arm.FEAT_DotProd");
    bf16 = apple("hw.optional.arm.FEAT_BF16");
#elif defined(__ARM_NEON) || defined(_M_ARM64)
    neon = true;
#endif

    return {{"avx2", avx2},
            {"fma", fma},
            {"f16c", f16c},
            {"avx512f", avx512f},
            {"avx512bw", avx512bw},
            {"avx512vl", avx512vl},
            {"avx512_vnni", avx512_vnni},
            {"avx512_bf16", avx512_bf16},
            {"avx512_fp16", avx512_fp16},
            {"amx_tile", amx_tile},
            {"amx_int8", amx_int8},
            {"amx_bf16", amx_bf16},
            {"neon", neon},
            {"asimddp", asimddp},
            {"bf16", bf16},
            {"sve", sve}};
}

}  // namespace federa
