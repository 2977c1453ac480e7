// What ggml-vulkan.cpp of llama.cpp names and Debian 12's Vulkan headers (1.3.239) do not have: VK_EXT_layer_settings, by
// which it would switch a validation layer on. Given to the compiler before the file; nothing where the headers have it.
// Source: the Vulkan specification, VkLayerSettingsCreateInfoEXT.
#include <vulkan/vulkan_core.h>

#ifndef VK_EXT_layer_settings
#include <vector>

namespace vk {

enum class LayerSettingTypeEXT : uint32_t { eBool32 = 0 };

struct LayerSettingEXT {
    const char * pLayerName;
    const char * pSettingName;
    LayerSettingTypeEXT type;
    uint32_t valueCount;
    const void * pValues;
};

// Whoever does not know this structure passes it by: that is what its first two members are for.
struct LayerSettingsCreateInfoEXT {
    VkStructureType sType = static_cast<VkStructureType>(1000496000);
    const void * pNext = nullptr;
    uint32_t settingCount;
    const LayerSettingEXT * pSettings;

    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & settings)
        : settingCount(static_cast<uint32_t>(settings.size())), pSettings(settings.data()) {}
};

}
#endif
