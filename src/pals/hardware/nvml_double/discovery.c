/* The library itself, which boards there are, and what each is. */
#define _GNU_SOURCE
#include "bank.h"

#include <stdio.h>
#include <string.h>

enum { CUDA_DRIVER_VERSION = 13000, BRAND_NVIDIA = 14, BUS_PCIE = 2, ENABLED = 1, ARCH_UNKNOWN = -1 };
enum { VENDOR_NVIDIA = 0x10DE }; /* the device half of the PCI id stays 0: these boards sit in no slot */

static nvmlReturn_t put_text(char *to, unsigned int size, const char *text) {
    if (!to) return NVML_ERROR_INVALID_ARGUMENT;
    if (strlen(text) >= size) return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(to, text);
    return NVML_SUCCESS;
}

static nvmlReturn_t put(unsigned int *to, unsigned int value) {
    if (!to) return NVML_ERROR_INVALID_ARGUMENT;
    *to = value;
    return NVML_SUCCESS;
}

/* --- the library ------------------------------------------------------------------------------------------------ */

API nvmlReturn_t nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    return pals_begin();
}
API nvmlReturn_t nvmlInit_v2(void) { return pals_begin(); }
API nvmlReturn_t nvmlInit(void) { return pals_begin(); }
API nvmlReturn_t nvmlShutdown(void) { return pals_end(); }

API const char *nvmlErrorString(nvmlReturn_t code) {
    static const struct { nvmlReturn_t code; const char *text; } known[] = {
        {NVML_SUCCESS, "Success"},
        {NVML_ERROR_UNINITIALIZED, "Uninitialized"},
        {NVML_ERROR_INVALID_ARGUMENT, "Invalid Argument"},
        {NVML_ERROR_NOT_SUPPORTED, "Not Supported"},
        {NVML_ERROR_NO_PERMISSION, "Insufficient Permissions"},
        {NVML_ERROR_NOT_FOUND, "Not Found"},
        {NVML_ERROR_INSUFFICIENT_SIZE, "Insufficient Size"},
        {NVML_ERROR_DRIVER_NOT_LOADED, "Driver Not Loaded"},
        {NVML_ERROR_TIMEOUT, "Timeout"},
        {NVML_ERROR_GPU_IS_LOST, "GPU is lost"},
        {NVML_ERROR_LIB_RM_VERSION_MISMATCH, "Driver/library version mismatch"},
        {NVML_ERROR_ARGUMENT_VERSION_MISMATCH, "Argument version mismatch"},
    };
    for (size_t k = 0; k < sizeof known / sizeof *known; k++)
        if (known[k].code == code) return known[k].text;
    return "Unknown Error";
}

API nvmlReturn_t nvmlSystemGetDriverVersion(char *text, unsigned int size) {
    pals_head head;
    nvmlReturn_t code = pals_head_of(&head);
    return code == NVML_SUCCESS ? put_text(text, size, head.driver) : code;
}
API nvmlReturn_t nvmlSystemGetNVMLVersion(char *text, unsigned int size) {
    pals_head head;
    char version[sizeof head.driver + 4];
    nvmlReturn_t code = pals_head_of(&head);
    if (code != NVML_SUCCESS) return code;
    snprintf(version, sizeof version, "13.%s", head.driver);
    return put_text(text, size, version);
}
API nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version) {
    return put((unsigned int *)version, CUDA_DRIVER_VERSION);
}
API nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) {
    return put((unsigned int *)version, CUDA_DRIVER_VERSION);
}
API nvmlReturn_t nvmlSystemGetProcessName(unsigned int pid, char *name, unsigned int size) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    FILE *file = fopen(path, "r");
    if (!file) return NVML_ERROR_NOT_FOUND;
    char text[1024] = "";
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = 0; /* the first argument ends at its own zero */
    return put_text(name, size, text);
}

/* --- which boards there are ------------------------------------------------------------------------------------- */

API nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count) {
    pals_head head;
    nvmlReturn_t code = pals_head_of(&head);
    return code == NVML_SUCCESS ? put(count, (unsigned int)head.count) : code;
}
API nvmlReturn_t nvmlDeviceGetCount(unsigned int *count) { return nvmlDeviceGetCount_v2(count); }

API nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device) {
    pals_view v;
    nvmlDevice_t found = (nvmlDevice_t)((uintptr_t)index + 1);
    nvmlReturn_t code = device ? pals_identify(found, &v) : NVML_ERROR_INVALID_ARGUMENT;
    if (code == NVML_SUCCESS) *device = found;
    return code;
}
API nvmlReturn_t nvmlDeviceGetHandleByIndex(unsigned int index, nvmlDevice_t *device) {
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

static void bus_id_of(unsigned int index, char *text, size_t size) { snprintf(text, size, "00000000:%02X:00.0", index + 1); }
static void serial_of(unsigned int index, char *text, size_t size) { snprintf(text, size, "EMULATED-%u", index); }

static int has_uuid(const pals_view *v, const char *text) { return !strcmp(v->board.uuid, text); }
static int has_serial(const pals_view *v, const char *text) {
    char own[32];
    serial_of(v->index, own, sizeof own);
    return !strcmp(own, text);
}
static int has_bus_id(const pals_view *v, const char *text) { /* "1:00.0", "0000:01:00.0", "00000000:01:00.0" */
    unsigned int domain = 0, bus, device, function;
    if (sscanf(text, "%x:%x:%x.%x", &domain, &bus, &device, &function) != 4 &&
        sscanf(text, "%x:%x.%x", &bus, &device, &function) != 3)
        return 0;
    return domain == 0 && device == 0 && function == 0 && bus == v->index + 1;
}

static nvmlReturn_t find(const char *text, int (*matches)(const pals_view *, const char *), nvmlDevice_t *device) {
    pals_view v;
    unsigned int count;
    nvmlReturn_t code = text && device ? nvmlDeviceGetCount_v2(&count) : NVML_ERROR_INVALID_ARGUMENT;
    for (unsigned int i = 0; code == NVML_SUCCESS && i < count; i++) {
        nvmlDevice_t candidate = (nvmlDevice_t)((uintptr_t)i + 1);
        code = pals_identify(candidate, &v);
        if (code == NVML_SUCCESS && matches(&v, text)) {
            *device = candidate;
            return NVML_SUCCESS;
        }
    }
    return code == NVML_SUCCESS ? NVML_ERROR_NOT_FOUND : code;
}
API nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *text, nvmlDevice_t *device) { return find(text, has_uuid, device); }
API nvmlReturn_t nvmlDeviceGetHandleBySerial(const char *text, nvmlDevice_t *device) { return find(text, has_serial, device); }
API nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *text, nvmlDevice_t *device) { return find(text, has_bus_id, device); }
API nvmlReturn_t nvmlDeviceGetHandleByPciBusId(const char *text, nvmlDevice_t *device) { return find(text, has_bus_id, device); }

/* --- what a board is -------------------------------------------------------------------------------------------- */

#define TEXT(name, expression)                                                                                         \
    API nvmlReturn_t name(nvmlDevice_t device, char *text, unsigned int size) {                                        \
        pals_view v;                                                                                                   \
        nvmlReturn_t code = pals_look(device, &v);                                                                     \
        return code == NVML_SUCCESS ? put_text(text, size, (expression)) : code;                                       \
    }
#define NUMBER(name, expression)                                                                                       \
    API nvmlReturn_t name(nvmlDevice_t device, unsigned int *value) {                                                  \
        pals_view v;                                                                                                   \
        nvmlReturn_t code = pals_look(device, &v);                                                                     \
        return code == NVML_SUCCESS ? put(value, (unsigned int)(expression)) : code;                                   \
    }
#define PAIR(name, first, second)                                                                                      \
    API nvmlReturn_t name(nvmlDevice_t device, unsigned int *a, unsigned int *b) {                                     \
        pals_view v;                                                                                                   \
        nvmlReturn_t code = pals_look(device, &v);                                                                     \
        if (code == NVML_SUCCESS) code = put(a, (unsigned int)(first));                                                \
        return code == NVML_SUCCESS ? put(b, (unsigned int)(second)) : code;                                           \
    }

static int architecture(const pals_head *head) {
    int major = (int)head->capability_major, minor = (int)head->capability_minor;
    if (major == 7) return minor >= 5 ? 6 : 5;  /* Turing, Volta */
    if (major == 8) return minor == 9 ? 8 : 7;  /* Ada, Ampere */
    if (major == 9) return 9;                   /* Hopper */
    return major >= 10 ? 10 : ARCH_UNKNOWN;     /* Blackwell */
}

TEXT(nvmlDeviceGetName, v.head.nvml_name)
TEXT(nvmlDeviceGetUUID, v.board.uuid)
TEXT(nvmlDeviceGetVbiosVersion, "EMULATED")
NUMBER(nvmlDeviceGetIndex, v.index)
NUMBER(nvmlDeviceGetMinorNumber, v.index)
NUMBER(nvmlDeviceGetBoardId, (v.index + 1) << 8)
NUMBER(nvmlDeviceGetMultiGpuBoard, 0)
NUMBER(nvmlDeviceGetBrand, BRAND_NVIDIA)
NUMBER(nvmlDeviceGetBusType, BUS_PCIE)
NUMBER(nvmlDeviceGetArchitecture, architecture(&v.head))
NUMBER(nvmlDeviceGetPersistenceMode, ENABLED)
NUMBER(nvmlDeviceGetPowerManagementMode, ENABLED)
NUMBER(nvmlDeviceGetComputeMode, 0)
NUMBER(nvmlDeviceGetDisplayMode, 0)
NUMBER(nvmlDeviceGetDisplayActive, 0)
NUMBER(nvmlDeviceGetMaxMigDeviceCount, 0)
NUMBER(nvmlDeviceIsMigDeviceHandle, 0)
PAIR(nvmlDeviceGetMigMode, 0, 0)
PAIR(nvmlDeviceGetEccMode, ENABLED, ENABLED)
PAIR(nvmlDeviceGetCudaComputeCapability, v.head.capability_major, v.head.capability_minor)

API nvmlReturn_t nvmlDeviceGetSerial(nvmlDevice_t device, char *text, unsigned int size) {
    pals_view v;
    char serial[32];
    nvmlReturn_t code = pals_look(device, &v);
    if (code != NVML_SUCCESS) return code;
    serial_of(v.index, serial, sizeof serial);
    return put_text(text, size, serial);
}

API nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *info) {
    pals_view v;
    nvmlReturn_t code = info ? pals_look(device, &v) : NVML_ERROR_INVALID_ARGUMENT;
    if (code != NVML_SUCCESS) return code;
    memset(info, 0, sizeof *info);
    info->bus = v.index + 1;
    info->device_id = VENDOR_NVIDIA;
    bus_id_of(v.index, info->bus_id, sizeof info->bus_id);
    snprintf(info->bus_id_legacy, sizeof info->bus_id_legacy, "%s", info->bus_id + 4);
    return NVML_SUCCESS;
}
API nvmlReturn_t nvmlDeviceGetPciInfo_v2(nvmlDevice_t device, nvmlPciInfo_t *info) {
    return nvmlDeviceGetPciInfo_v3(device, info);
}
API nvmlReturn_t nvmlDeviceGetPciInfo(nvmlDevice_t device, nvmlPciInfo_t *info) {
    return nvmlDeviceGetPciInfo_v3(device, info);
}
