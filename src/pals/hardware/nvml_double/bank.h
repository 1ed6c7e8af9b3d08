/* The emulated boards as the entry points see them: a consistent copy to read, and a locked record to write. */
#pragma once
#include "bank_layout.h"
#include "nvml_api.h"

typedef struct {
    unsigned int index;
    pals_head head;
    pals_board board;
    pals_reading reading;
    pals_process processes[PALS_PROCESSES]; /* those that said they use this board, then zeros */
} pals_view;

/* Whether a process exists and is no zombie. */
int pals_process_lives(int64_t pid);

/* Begin and end using the library; counted, as NVML does. */
nvmlReturn_t pals_begin(void);
nvmlReturn_t pals_end(void);

/* Copy the facts that hold for every board. */
nvmlReturn_t pals_head_of(pals_head *head);

/* Copy what is known of a board, though it be lost. */
nvmlReturn_t pals_identify(nvmlDevice_t device, pals_view *view);

/* Copy what a board shows; GPU_IS_LOST where it is lost, or where nobody keeps its readings fresh. */
nvmlReturn_t pals_look(nvmlDevice_t device, pals_view *view);

/* Change a board's registers as a privileged user, after the delay a real setter takes; `valid` says whether the
   arguments are acceptable, and is judged after the permission, as drivers do. A board may refuse one lever alone. */
typedef void pals_change(pals_board *, double, double);
enum pals_lever { PALS_LIMIT, PALS_CLOCK_LOCK, PALS_MODE };
nvmlReturn_t pals_set(nvmlDevice_t device, enum pals_lever lever, int valid, pals_change *change, double a, double b);
