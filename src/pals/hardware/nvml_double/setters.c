/* What a privileged user may change: the power limit and the clock lock. */
#include "bank.h"

enum { SCOPE_GPU = 0, ENABLED = 1 };

static void set_limit(pals_board *board, double watts, double unused) {
    (void)unused;
    board->limit_w = watts;
}
static void set_lock(pals_board *board, double low_mhz, double high_mhz) {
    board->lock_lo_mhz = low_mhz; /* onto the clock grid and into the range it comes where it is obeyed */
    board->lock_hi_mhz = high_mhz;
}
static void keep(pals_board *board, double unused, double unused_too) { (void)board, (void)unused, (void)unused_too; }

API nvmlReturn_t nvmlDeviceSetPowerManagementLimit(nvmlDevice_t device, unsigned int milliwatts) {
    pals_view v;
    nvmlReturn_t code = pals_look(device, &v);
    if (code != NVML_SUCCESS) return code;
    double watts = milliwatts / 1000.0;
    return pals_set(device, PALS_LIMIT, v.head.min_limit_w <= watts && watts <= v.head.max_limit_w, set_limit, watts, 0);
}
API nvmlReturn_t nvmlDeviceSetPowerManagementLimit_v2(nvmlDevice_t device, nvmlPowerValue_v2_t *wanted) {
    if (!wanted) return NVML_ERROR_INVALID_ARGUMENT;
    if (wanted->version != NVML_POWER_VALUE_V2) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (wanted->scope != SCOPE_GPU) return NVML_ERROR_NOT_SUPPORTED;
    return nvmlDeviceSetPowerManagementLimit(device, wanted->milliwatts);
}
API nvmlReturn_t nvmlDeviceSetGpuLockedClocks(nvmlDevice_t device, unsigned int low_mhz, unsigned int high_mhz) {
    return pals_set(device, PALS_CLOCK_LOCK, 0 < low_mhz && low_mhz <= high_mhz, set_lock, low_mhz, high_mhz);
}
API nvmlReturn_t nvmlDeviceResetGpuLockedClocks(nvmlDevice_t device) {
    pals_view v;
    nvmlReturn_t code = pals_look(device, &v);
    return code == NVML_SUCCESS ? pals_set(device, PALS_CLOCK_LOCK, 1, set_lock, 0, (double)v.head.max_sm_clock_mhz) : code;
}

/* Persistence is always on: the boards live as long as who keeps them. */
API nvmlReturn_t nvmlDeviceSetPersistenceMode(nvmlDevice_t device, int mode) {
    return pals_set(device, PALS_MODE, mode == ENABLED, keep, 0, 0);
}
