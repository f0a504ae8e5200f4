"""Where earlier versions had the registration of the model type: use `selectmoe.register_select_moe`."""

from selectmoe.model.quiet_loading import register_select_moe as register_select_moe
