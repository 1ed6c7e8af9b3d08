/* Who uses a board: the processes that registered in the bank and still live. All compute, none draws. */
#define _GNU_SOURCE
#include "bank.h"

#include <math.h>
#include <time.h>

/* Copy the living to the front; return how many. */
static nvmlReturn_t living(nvmlDevice_t device, pals_view *v, unsigned int *n) {
    nvmlReturn_t code = pals_look(device, v);
    *n = 0;
    for (size_t k = 0; code == NVML_SUCCESS && k < PALS_PROCESSES && v->processes[k].pid; k++)
        if (pals_process_lives(v->processes[k].pid)) v->processes[(*n)++] = v->processes[k];
    return code;
}

/* The size NVML asks back for: success where all fit, else how many there are. */
static nvmlReturn_t room(unsigned int *count, const void *array, unsigned int n) {
    if (!count) return NVML_ERROR_INVALID_ARGUMENT;
    int fits = n == 0 || (array && *count >= n);
    *count = n;
    return fits ? NVML_SUCCESS : NVML_ERROR_INSUFFICIENT_SIZE;
}

API nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned int *count, nvmlProcessInfo_t *infos) {
    pals_view v;
    unsigned int n;
    nvmlReturn_t code = living(device, &v, &n);
    if (code == NVML_SUCCESS) code = room(count, infos, n);
    for (unsigned int k = 0; code == NVML_SUCCESS && k < n; k++) {
        const pals_process *p = &v.processes[k];
        infos[k] = (nvmlProcessInfo_t){(unsigned int)p->pid, (unsigned long long)p->memory_bytes, NVML_NO_INSTANCE, NVML_NO_INSTANCE};
    }
    return code;
}
API nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t device, unsigned int *count, nvmlProcessInfo_t *infos) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, infos);
}
API nvmlReturn_t nvmlDeviceGetComputeRunningProcesses(nvmlDevice_t device, unsigned int *count, nvmlProcessInfo_v1_t *infos) {
    pals_view v;
    unsigned int n;
    nvmlReturn_t code = living(device, &v, &n);
    if (code == NVML_SUCCESS) code = room(count, infos, n);
    for (unsigned int k = 0; code == NVML_SUCCESS && k < n; k++)
        infos[k] = (nvmlProcessInfo_v1_t){(unsigned int)v.processes[k].pid, (unsigned long long)v.processes[k].memory_bytes};
    return code;
}

#define NONE(name)                                                                                                     \
    API nvmlReturn_t name(nvmlDevice_t device, unsigned int *count, void *infos) {                                     \
        pals_view v;                                                                                                   \
        nvmlReturn_t code = pals_look(device, &v);                                                                     \
        return code == NVML_SUCCESS ? room(count, infos, 0) : code;                                                    \
    }
NONE(nvmlDeviceGetGraphicsRunningProcesses)
NONE(nvmlDeviceGetGraphicsRunningProcesses_v2)
NONE(nvmlDeviceGetGraphicsRunningProcesses_v3)
NONE(nvmlDeviceGetMPSComputeRunningProcesses)
NONE(nvmlDeviceGetMPSComputeRunningProcesses_v2)
NONE(nvmlDeviceGetMPSComputeRunningProcesses_v3)

/* The board's utilisation is its only process's; how several share it is not known. */
API nvmlReturn_t nvmlDeviceGetProcessUtilization(
    nvmlDevice_t device, nvmlProcessUtilizationSample_t *samples, unsigned int *count, unsigned long long since_us) {
    pals_view v;
    unsigned int n;
    struct timespec t;
    nvmlReturn_t code = living(device, &v, &n);
    if (code == NVML_SUCCESS && n == 0) return NVML_ERROR_NOT_FOUND;
    if (code == NVML_SUCCESS && n > 1) return NVML_ERROR_NOT_SUPPORTED;
    if (code == NVML_SUCCESS) code = room(count, samples, n);
    if (code != NVML_SUCCESS) return code;
    clock_gettime(CLOCK_REALTIME, &t);
    unsigned long long time_us = (unsigned long long)t.tv_sec * 1000000ULL + (unsigned long long)t.tv_nsec / 1000ULL;
    if (time_us < since_us) return NVML_ERROR_NOT_FOUND;
    samples[0] = (nvmlProcessUtilizationSample_t){
        .pid = (unsigned int)v.processes[0].pid,
        .time_us = time_us,
        .sm = (unsigned int)lrint(v.reading.busy * 100.0),
        .memory = (unsigned int)lrint(v.reading.memory_busy * 100.0),
    };
    return NVML_SUCCESS;
}
