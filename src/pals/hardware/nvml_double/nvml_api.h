/* What of NVML's public interface this library answers: names, codes and structs, declared from its documentation. */
#pragma once
#include <stdint.h>

#define API __attribute__((visibility("default")))

typedef int nvmlReturn_t;
typedef struct pals_handle *nvmlDevice_t; /* board index + 1, never dereferenced */

enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NO_PERMISSION = 4,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_DRIVER_NOT_LOADED = 9,
    NVML_ERROR_TIMEOUT = 10,
    NVML_ERROR_GPU_IS_LOST = 15,
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18,
    NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25,
};

enum { NVML_CLOCK_GRAPHICS = 0, NVML_CLOCK_SM = 1, NVML_CLOCK_MEM = 2 };
enum { NVML_CLOCK_ID_CURRENT = 0, NVML_CLOCK_ID_CUSTOMER_BOOST_MAX = 3 };
enum { NVML_VALUE_TYPE_UNSIGNED_INT = 1, NVML_VALUE_TYPE_UNSIGNED_LONG_LONG = 3 };
enum {
    NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION = 83,
    NVML_FI_DEV_POWER_AVERAGE = 185,
    NVML_FI_DEV_POWER_INSTANT = 186,
    NVML_FI_DEV_POWER_MIN_LIMIT = 187,
    NVML_FI_DEV_POWER_MAX_LIMIT = 188,
    NVML_FI_DEV_POWER_DEFAULT_LIMIT = 189,
    NVML_FI_DEV_POWER_CURRENT_LIMIT = 190,
    NVML_FI_DEV_POWER_REQUESTED_LIMIT = 192,
};

#define NVML_MEMORY_V2 0x02000028u
#define NVML_TEMPERATURE_V1 0x0100000Cu
#define NVML_POWER_VALUE_V2 0x0200000Cu
#define NVML_NO_INSTANCE 0xFFFFFFFFu

typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } nvmlMemory_v2_t;
typedef struct { unsigned int gpu, memory; } nvmlUtilization_t;
typedef struct { unsigned int version, sensor; int celsius; } nvmlTemperature_t;
typedef struct { unsigned int version, scope, milliwatts; } nvmlPowerValue_v2_t;
typedef struct { unsigned int pid; unsigned long long memory; } nvmlProcessInfo_v1_t;
typedef struct { unsigned int pid; unsigned long long memory; unsigned int gpu_instance, compute_instance; } nvmlProcessInfo_t;
typedef struct { unsigned int pid; unsigned long long time_us; unsigned int sm, memory, encoder, decoder; } nvmlProcessUtilizationSample_t;
typedef union { double d; unsigned int ui; unsigned long long ull; } nvmlValue_t;
typedef struct {
    uint32_t field, scope;
    int64_t time_us, latency_us;
    uint32_t type;
    nvmlReturn_t code;
    nvmlValue_t value;
} nvmlFieldValue_t;
typedef struct {
    char bus_id_legacy[16];
    unsigned int domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} nvmlPciInfo_t;

_Static_assert(sizeof(nvmlMemory_v2_t) == 0x28, "memory v2");
_Static_assert(sizeof(nvmlProcessInfo_t) == 24 && sizeof(nvmlProcessInfo_v1_t) == 16, "process lists");
_Static_assert(sizeof(nvmlFieldValue_t) == 40 && sizeof(nvmlPciInfo_t) == 68, "fields, PCI");
