/* What a board shows: power, energy, limits, clocks, temperature, utilisation, memory. */
#define _GNU_SOURCE
#include "bank.h"

#include <math.h>
#include <string.h>
#include <time.h>

enum { SENSOR_GPU = 0, SCOPE_GPU = 0, IDLE_OR_POWER_CAP = 0x1 | 0x4, MAX_FIELDS = 1024 };

static unsigned int milli(double value) { return (unsigned int)lrint(value * 1000.0); }
static double enforced_w(const pals_view *v) { return fmin(v->board.limit_w, v->board.external_w); }
static unsigned long long now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (unsigned long long)t.tv_sec * 1000000ULL + (unsigned long long)t.tv_nsec / 1000ULL;
}

#define SENSOR(name, type, expression)                                                                                 \
    API nvmlReturn_t name(nvmlDevice_t device, type *value) {                                                          \
        pals_view v;                                                                                                   \
        nvmlReturn_t code = value ? pals_look(device, &v) : NVML_ERROR_INVALID_ARGUMENT;                               \
        if (code == NVML_SUCCESS) *value = (type)(expression);                                                         \
        return code;                                                                                                   \
    }

SENSOR(nvmlDeviceGetPowerUsage, unsigned int, milli(v.reading.power_avg_w))
SENSOR(nvmlDeviceGetTotalEnergyConsumption, unsigned long long, llrint(v.reading.energy_j * 1000.0))
SENSOR(nvmlDeviceGetEnforcedPowerLimit, unsigned int, milli(enforced_w(&v)))
SENSOR(nvmlDeviceGetPowerManagementLimit, unsigned int, milli(v.board.limit_w))
SENSOR(nvmlDeviceGetPowerManagementDefaultLimit, unsigned int, milli(v.head.default_limit_w))
SENSOR(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, v.reading.throttle)
SENSOR(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, v.reading.throttle)
SENSOR(nvmlDeviceGetSupportedClocksThrottleReasons, unsigned long long, IDLE_OR_POWER_CAP)
SENSOR(nvmlDeviceGetSupportedClocksEventReasons, unsigned long long, IDLE_OR_POWER_CAP)
SENSOR(nvmlDeviceGetPerformanceState, unsigned int, 0)
SENSOR(nvmlDeviceGetPowerState, unsigned int, 0)

API nvmlReturn_t nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t device, unsigned int *low, unsigned int *high) {
    pals_view v;
    nvmlReturn_t code = low && high ? pals_look(device, &v) : NVML_ERROR_INVALID_ARGUMENT;
    if (code == NVML_SUCCESS) *low = milli(v.head.min_limit_w), *high = milli(v.head.max_limit_w);
    return code;
}

API nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, int sensor, unsigned int *celsius) {
    pals_view v;
    nvmlReturn_t code = celsius && sensor == SENSOR_GPU ? pals_look(device, &v) : NVML_ERROR_INVALID_ARGUMENT;
    if (code == NVML_SUCCESS) *celsius = (unsigned int)lrint(v.reading.temperature_c);
    return code;
}
API nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, nvmlTemperature_t *temperature) {
    if (!temperature) return NVML_ERROR_INVALID_ARGUMENT;
    if (temperature->version != NVML_TEMPERATURE_V1) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    return nvmlDeviceGetTemperature(device, (int)temperature->sensor, (unsigned int *)&temperature->celsius);
}

/* --- clocks ----------------------------------------------------------------------------------------------------- */

/* Graphics and SM run at one clock; the video clock is not modelled. */
static nvmlReturn_t clock_of(nvmlDevice_t device, int kind, int top, unsigned int *mhz) {
    pals_view v;
    nvmlReturn_t code = mhz && kind >= 0 && kind <= 3 ? pals_look(device, &v) : NVML_ERROR_INVALID_ARGUMENT;
    if (code != NVML_SUCCESS) return code;
    if (kind == NVML_CLOCK_MEM) *mhz = (unsigned int)v.head.memory_clock_mhz;
    else if (kind == NVML_CLOCK_SM || kind == NVML_CLOCK_GRAPHICS)
        *mhz = (unsigned int)(top ? v.head.max_sm_clock_mhz : v.reading.sm_clock_mhz);
    else return NVML_ERROR_NOT_SUPPORTED;
    return NVML_SUCCESS;
}
API nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, int kind, unsigned int *mhz) { return clock_of(device, kind, 0, mhz); }
API nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, int kind, unsigned int *mhz) { return clock_of(device, kind, 1, mhz); }
API nvmlReturn_t nvmlDeviceGetMaxCustomerBoostClock(nvmlDevice_t device, int kind, unsigned int *mhz) {
    return clock_of(device, kind, 1, mhz);
}
API nvmlReturn_t nvmlDeviceGetClock(nvmlDevice_t device, int kind, int id, unsigned int *mhz) {
    if (id == NVML_CLOCK_ID_CURRENT || id == NVML_CLOCK_ID_CUSTOMER_BOOST_MAX) return clock_of(device, kind, id, mhz);
    return NVML_ERROR_NOT_SUPPORTED; /* application clocks */
}

/* Fill `mhz` from `top` downwards; tell the size where the array is too small, as NVML does. */
static nvmlReturn_t list_clocks(int64_t top, int64_t bottom, int64_t step, unsigned int *count, unsigned int *mhz) {
    unsigned int needed = (unsigned int)((top - bottom) / step + 1);
    if (!count) return NVML_ERROR_INVALID_ARGUMENT;
    int fits = mhz && *count >= needed;
    *count = needed;
    for (unsigned int k = 0; fits && k < needed; k++) mhz[k] = (unsigned int)(top - step * k);
    return fits ? NVML_SUCCESS : NVML_ERROR_INSUFFICIENT_SIZE;
}
API nvmlReturn_t nvmlDeviceGetSupportedMemoryClocks(nvmlDevice_t device, unsigned int *count, unsigned int *mhz) {
    pals_view v;
    nvmlReturn_t code = pals_look(device, &v);
    if (code != NVML_SUCCESS) return code;
    return list_clocks(v.head.memory_clock_mhz, v.head.memory_clock_mhz, 1, count, mhz);
}
API nvmlReturn_t nvmlDeviceGetSupportedGraphicsClocks(nvmlDevice_t device, unsigned int memory, unsigned int *count, unsigned int *mhz) {
    pals_view v;
    nvmlReturn_t code = pals_look(device, &v);
    if (code != NVML_SUCCESS) return code;
    if (memory != (unsigned int)v.head.memory_clock_mhz) return NVML_ERROR_NOT_FOUND;
    return list_clocks(v.head.max_sm_clock_mhz, v.head.min_sm_clock_mhz, v.head.clock_step_mhz, count, mhz);
}

/* --- use -------------------------------------------------------------------------------------------------------- */

API nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *rates) {
    pals_view v;
    nvmlReturn_t code = rates ? pals_look(device, &v) : NVML_ERROR_INVALID_ARGUMENT;
    if (code != NVML_SUCCESS) return code;
    rates->gpu = (unsigned int)lrint(v.reading.busy * 100.0);
    rates->memory = (unsigned int)lrint(v.reading.memory_busy * 100.0);
    return NVML_SUCCESS;
}

static nvmlReturn_t no_media(nvmlDevice_t device, unsigned int *percent, unsigned int *period_us) {
    pals_view v;
    nvmlReturn_t code = percent && period_us ? pals_look(device, &v) : NVML_ERROR_INVALID_ARGUMENT;
    if (code == NVML_SUCCESS) *percent = 0, *period_us = 250000;
    return code;
}
API nvmlReturn_t nvmlDeviceGetEncoderUtilization(nvmlDevice_t device, unsigned int *percent, unsigned int *period_us) {
    return no_media(device, percent, period_us);
}
API nvmlReturn_t nvmlDeviceGetDecoderUtilization(nvmlDevice_t device, unsigned int *percent, unsigned int *period_us) {
    return no_media(device, percent, period_us);
}
API nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, int kind, int counter, unsigned long long *count) {
    (void)kind, (void)counter; /* emulated memory has no bit errors */
    pals_view v;
    nvmlReturn_t code = count ? pals_look(device, &v) : NVML_ERROR_INVALID_ARGUMENT;
    if (code == NVML_SUCCESS) *count = 0;
    return code;
}

static unsigned long long used_bytes(const pals_view *v) {
    unsigned long long used = 0;
    for (const pals_process *p = v->processes; p < v->processes + PALS_PROCESSES && p->pid; p++)
        if (pals_process_lives(p->pid)) used += (unsigned long long)p->memory_bytes;
    unsigned long long total = (unsigned long long)v->head.memory_bytes;
    return used < total ? used : total;
}
API nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory) {
    pals_view v;
    nvmlReturn_t code = memory ? pals_look(device, &v) : NVML_ERROR_INVALID_ARGUMENT;
    if (code != NVML_SUCCESS) return code;
    memory->total = (unsigned long long)v.head.memory_bytes;
    memory->used = used_bytes(&v);
    memory->free = memory->total - memory->used;
    return NVML_SUCCESS;
}
API nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory) {
    if (!memory) return NVML_ERROR_INVALID_ARGUMENT;
    if (memory->version != NVML_MEMORY_V2) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    nvmlMemory_t plain;
    nvmlReturn_t code = nvmlDeviceGetMemoryInfo(device, &plain);
    if (code != NVML_SUCCESS) return code;
    memory->total = plain.total, memory->used = plain.used, memory->free = plain.free, memory->reserved = 0;
    return NVML_SUCCESS;
}

/* --- field values ----------------------------------------------------------------------------------------------- */

static nvmlReturn_t field(const pals_view *v, nvmlFieldValue_t *f) {
    f->type = NVML_VALUE_TYPE_UNSIGNED_INT;
    if (f->scope != SCOPE_GPU) return NVML_ERROR_NOT_SUPPORTED; /* module and memory rails are not metered apart */
    switch (f->field) {
    case NVML_FI_DEV_POWER_AVERAGE: f->value.ui = milli(v->reading.power_avg_w); break;
    case NVML_FI_DEV_POWER_INSTANT: f->value.ui = milli(v->reading.power_instant_w); break;
    case NVML_FI_DEV_POWER_MIN_LIMIT: f->value.ui = milli(v->head.min_limit_w); break;
    case NVML_FI_DEV_POWER_MAX_LIMIT: f->value.ui = milli(v->head.max_limit_w); break;
    case NVML_FI_DEV_POWER_DEFAULT_LIMIT: f->value.ui = milli(v->head.default_limit_w); break;
    case NVML_FI_DEV_POWER_CURRENT_LIMIT: f->value.ui = milli(enforced_w(v)); break;
    case NVML_FI_DEV_POWER_REQUESTED_LIMIT: f->value.ui = milli(v->board.limit_w); break;
    case NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION:
        f->type = NVML_VALUE_TYPE_UNSIGNED_LONG_LONG;
        f->value.ull = (unsigned long long)llrint(v->reading.energy_j * 1000.0);
        break;
    default: return NVML_ERROR_NOT_SUPPORTED;
    }
    return NVML_SUCCESS;
}
API nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, nvmlFieldValue_t *fields) {
    pals_view v;
    nvmlReturn_t code = fields && count > 0 && count <= MAX_FIELDS ? pals_look(device, &v) : NVML_ERROR_INVALID_ARGUMENT;
    for (int k = 0; code == NVML_SUCCESS && k < count; k++) {
        memset(&fields[k].value, 0, sizeof fields[k].value);
        fields[k].code = field(&v, &fields[k]);
        fields[k].time_us = (int64_t)now_us();
        fields[k].latency_us = 0;
    }
    return code;
}
